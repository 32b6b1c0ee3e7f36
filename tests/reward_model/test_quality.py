"""Measures of a reward model by hand, and by what length can and cannot say."""

import math

import numpy as np
import pytest

from mara_jax.reward_model import quality
from mara_jax.reward_model.pairs import Pair
from mara_jax.reward_model.quality import Lengths


def test_accuracy_and_loss_by_hand():
    pairs = [Pair("a", "x", "y"), Pair("a", "x", "z"), Pair("b", "x", "y"), Pair("b", "u", "v")]
    margin = np.array([2.0, -1.0, 0.0, 3.0])
    measured = quality.accuracy(pairs, margin)
    assert measured["accuracy"] == (1 + 0 + 0.5 + 1) / 4 and (measured["pairs"], measured["prompts"]) == (4, 2)
    # Two prompts: a resample has a's share .5, b's .75, or their mean.
    assert measured["interval"] == [0.5, 0.75]
    expected = np.mean([math.log(1 + math.exp(-one)) for one in margin])
    assert quality.loss(margin) == pytest.approx(expected)
    assert quality.accuracy(pairs[:2], margin[:2])["interval"] is None


def test_predictions_that_are_true_are_calibrated_and_others_are_not():
    """Pairs won with probability sigmoid(margin), and the same with margins thrice as large, which is too sure."""
    random = np.random.default_rng(0)
    size = random.exponential(1.5, 20000)
    margin = np.where(random.random(20000) < 1 / (1 + np.exp(-size)), size, -size)
    true, bold = quality.calibration(margin), quality.calibration(3 * margin)
    assert true["error"] < 0.015 < 0.1 < bold["error"]
    assert sum(one["count"] for one in true["bins"]) == 20000 and len(true["bins"]) == quality.BINS
    inside = [one["low"] <= one["predicted"] <= one["high"] for one in true["bins"]]
    assert sum(inside) >= 8
    assert all(one["low"] <= one["observed"] <= one["high"] for one in true["bins"])


def test_calibration_by_hand():
    """One sure pair that is right: its first completion is predicted at .9999 or .0001, and observed at 1 or 0."""
    (one,) = quality.calibration(np.array([9.0]))["bins"]
    assert one["count"] == 1 and abs(one["predicted"] - one["observed"]) < 2e-4


def test_what_length_says():
    random = np.random.default_rng(1)
    short, long = random.integers(1, 20, 300).astype(float), random.integers(21, 60, 300).astype(float)
    parts = Lengths(long, short), Lengths(long[::-1], short[::-1])
    assert quality.by_length(*parts) == {"longer": 1.0, "fitted": 1.0}
    assert quality.by_length(*[Lengths(part.rejected, part.chosen) for part in parts]) == {"longer": 1, "fitted": 1}
    same = Lengths(short, short)
    assert quality.by_length(same, same) == {"longer": 0.5, "fitted": 0.5}
    # A middling length is best: the longer is as often right as wrong, but the cubic sees it.
    middle, apart = np.full(300, 20.0), np.where(np.arange(300) % 2, 5.0, 80.0)
    said = quality.by_length(Lengths(middle, apart), Lengths(middle, apart))
    assert said["longer"] == 0.5 and said["fitted"] == 1.0
    unrelated = Lengths(*random.integers(1, 60, (2, 4000)).astype(float))
    assert all(abs(share - 0.5) < 0.03 for share in quality.by_length(unrelated, unrelated).values())
