"""Bootstrap intervals against exact enumeration, SciPy and the normal limit."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mara_jax.measures import bootstrap


def test_resamples_have_the_distribution_of_all_27_draws():
    """Three prompts: the bounds are quantiles of the means of the 27 equally likely draws."""
    values = np.array([0.0, 1.0, 5.0])
    means = np.sort([np.mean(values[list(rows)]) for rows in itertools.product(range(3), repeat=3)])
    got = bootstrap.interval(values, level=0.8, resamples=20000)
    assert got.value == 2
    # One of 27 draws has mean 0, three have 1/3: a tenth is passed within the latter; at the top one has 5, three 11/3.
    assert got.low == pytest.approx(1 / 3) == means[2] and got.high == pytest.approx(11 / 3) == means[-3]


def test_interval_of_a_mean_is_the_normal_one_for_many_prompts():
    values = np.random.default_rng(1).exponential(size=4000)
    got = bootstrap.interval(values, resamples=4000)
    half = 1.96 * values.std() / 4000**0.5
    assert got.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_of_a_median_is_scipy_s():
    values = np.random.default_rng(2).normal(size=101)
    got = bootstrap.interval(values, lambda rows: np.median(rows, axis=-1), level=0.9, resamples=8000)
    theirs = stats.bootstrap(
        (values,), np.median, confidence_level=0.9, n_resamples=8000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert got.value == np.median(values)
    assert got[1:] == pytest.approx(tuple(theirs), abs=0.03)


def test_more_resamples_leave_the_first_as_they_are(monkeypatch):
    few = np.concatenate(list(bootstrap._resampled(7, 10, seed=5)))
    assert np.array_equal(np.concatenate(list(bootstrap._resampled(7, 40, seed=5)))[:10], few)
    assert not np.array_equal(np.concatenate(list(bootstrap._resampled(7, 10, seed=6))), few)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 21)  # three rows at once
    assert np.array_equal(np.concatenate(list(bootstrap._resampled(7, 10, seed=5))), few)


def test_a_paired_difference_is_free_of_what_both_share():
    """A constant gap has no spread, however the prompts differ; unpaired intervals would overlap."""
    hard = np.random.default_rng(4).normal(size=50) * 10
    got = bootstrap.difference(hard + 1, hard)
    assert got[:3] == pytest.approx((1, 1, 1)) and got.not_better == 0
    assert bootstrap.difference(hard, hard).not_better == 1


def test_a_paired_difference_is_the_interval_of_the_gaps():
    first, second = np.random.default_rng(5).normal(size=(2, 30))
    got = bootstrap.difference(first, second, seed=3)
    assert got[:3] == pytest.approx(tuple(bootstrap.interval(first - second, seed=3)))
    drawn = np.concatenate(list(bootstrap._resampled(30, bootstrap.RESAMPLES, 3)))
    assert got.not_better == np.mean((first - second)[drawn].mean(axis=1) <= 0)


@pytest.mark.parametrize(
    ("values", "level", "words"),
    [([1.0], 0.95, "two or more"), ([1.0, np.nan], 0.95, "not finite"), ([1.0, 2.0], 95, "between 0 and 1")],
)
def test_what_cannot_be_resampled_is_refused(values, level, words):
    with pytest.raises(ValueError, match=words):
        bootstrap.interval(values, level=level)


def test_pairs_need_the_same_prompts():
    with pytest.raises(ValueError, match="2 prompts against 3"):
        bootstrap.difference([1, 2], [1, 2, 3])
