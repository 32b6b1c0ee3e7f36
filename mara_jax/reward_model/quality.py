"""How good a reward model is on held-out pairs: right pairs, calibration, and what length alone says of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.core import diversity
from mara_jax.measures import bootstrap
from mara_jax.reward_model.pairs import Pair
from mara_jax.tasks.base import text_of

BINS = 10  # of predicted probabilities, equally wide
DEGREE = 3  # of the polynomial of length
RIDGE = 1e-3  # which keeps its coefficients finite where length tells everything
STEPS = 100  # of Newton's method


class Lengths(NamedTuple):
    """Lengths of completions: chosen, rejected [n], in some unit."""

    chosen: np.ndarray
    rejected: np.ndarray


def right(margin_n: np.ndarray) -> np.ndarray:
    """[n] 1 where a margin, of the chosen completion over the rejected one, is positive, .5 for a tie, else 0."""
    return (np.sign(margin_n) + 1) / 2


def accuracy(pairs: Sequence[Pair], margin_n: np.ndarray) -> dict[str, Any]:
    """The share of right pairs, and its bootstrap interval over prompts, whose pairs are not independent."""
    correct, prompts = right(margin_n), np.array([text_of(pair.prompt) for pair in pairs])
    counts = [(correct[prompts == name].sum(), np.sum(prompts == name)) for name in dict.fromkeys(prompts.tolist())]
    sums = np.array(counts)
    known = {"accuracy": float(correct.mean()), "pairs": len(pairs), "prompts": len(counts)}
    if len(counts) < 2:
        return known | {"interval": None}
    # A resample's share is that of its prompts' pairs; a prompt is given by its place.
    share = bootstrap.interval(np.arange(len(counts)), lambda rows: _share(sums, rows.astype(int)))
    return known | {"interval": [share.low, share.high]}


def _share(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return sums[rows, 0].sum(axis=-1) / sums[rows, 1].sum(axis=-1)


def loss(margin_n: np.ndarray) -> float:
    """-log sigmoid of margins, their mean (nats)."""
    return float(np.mean(np.logaddexp(0, -margin_n)))


def calibration(margin_n: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Predicted probabilities against what was observed.

    Of each pair a coin decides which completion comes first. The model predicts that the first was chosen with
    probability sigmoid(difference of scores); pairs are grouped by it.

    Returns:
      bins: each with mean prediction, observed share, its Wilson interval and its count; error: the mean distance of
      the two, weighted by counts (expected calibration error).
    """
    first = np.random.Generator(np.random.Philox(key=seed)).integers(2, size=len(margin_n)).astype(bool)
    predicted = 1 / (1 + np.exp(-np.where(first, margin_n, -margin_n).astype(np.float64)))
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    bins = []
    for number in range(BINS):
        chosen = first[place == number]
        if len(chosen):
            low, high = diversity.interval(float(chosen.sum()), len(chosen))
            row = {"predicted": float(predicted[place == number].mean()), "observed": float(chosen.mean())}
            bins.append(row | {"low": low, "high": high, "count": len(chosen)})
    gaps = [one["count"] * abs(one["predicted"] - one["observed"]) for one in bins]
    return {"bins": bins, "error": sum(gaps) / max(len(margin_n), 1)}


def by_length(training: Lengths, held_out: Lengths) -> dict[str, float]:
    """The share of held-out pairs that length alone gets right, by two rules learned from the training pairs.

    longer: the longer completion is better, or, where that fits the training pairs better, the shorter one; fitted: the
    one with the higher value of a polynomial of log length, fitted by the pairwise loss, so that a middling length may
    be best. Ties count half.
    """
    sign = 1 if right(training.chosen - training.rejected).mean() >= 0.5 else -1
    features = [_features(*lengths, training) for lengths in (training, held_out)]
    fitted = features[1] @ _fit(features[0])
    # Features of equal lengths are equal: their difference is zero, not almost.
    return {
        "longer": float(right(sign * (held_out.chosen - held_out.rejected)).mean()),
        "fitted": float(right(fitted).mean()),
    }


def _features(chosen: np.ndarray, rejected: np.ndarray, training: Lengths) -> np.ndarray:
    """[n, DEGREE] Differences of powers of log length, standardised by the training pairs."""
    known = np.log1p(np.concatenate(training))
    centre, scale = known.mean(), known.std() or 1.0
    z = [(np.log1p(length) - centre) / scale for length in (chosen, rejected)]
    return np.stack([z[0] ** power - z[1] ** power for power in range(1, DEGREE + 1)], axis=-1)


def _fit(difference_nk: np.ndarray) -> np.ndarray:
    """[k] Coefficients of least mean -log sigmoid(difference @ coefficients), by Newton's method with a ridge."""
    weights = np.zeros(difference_nk.shape[1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-difference_nk @ weights))
        gradient = difference_nk.T @ (p - 1) / len(p) + RIDGE * weights
        hessian = (difference_nk * (p * (1 - p))[:, None]).T @ difference_nk / len(p) + RIDGE * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step / max(1.0, np.linalg.norm(step))  # a long first step may lead away from the minimum
    return weights
