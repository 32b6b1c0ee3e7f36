"""Measures of diversity against hand arithmetic."""

import numpy as np
import pytest
from scipy.stats import binomtest

from mara_jax.core import diversity


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([1, 1], 1.0),
        ([5, 0], 0.0),
        ([0, 0], 0.0),
        ([3, 1], 2 - 0.75 * np.log2(3)),
        ([1, 1, 1, 1], 2.0),
        ([0.25, 0.25, 0.5], 1.5),
        ([10**9, 10**9], 1.0),
    ],
)
def test_entropy(counts, bits):
    value = diversity.entropy_bits(counts)
    assert isinstance(value, float) and np.isclose(value, bits, atol=1e-12) and np.signbit(value) == np.False_


def test_counts_are_pooled_over_the_window_and_not_beyond():
    counts_ta = np.stack([np.arange(1, 12), np.zeros(11)], axis=1)
    pooled = diversity.pooled_counts(counts_ta, window=3)[:, 0]
    assert pooled.tolist() == [1, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert diversity.pooled_counts(counts_ta[:2], window=8)[:, 0].tolist() == [1, 3]
    assert diversity.pooled_counts(np.zeros((0, 2))).shape == (0, 2)


def test_shares():
    assert diversity.shares([3, 1]).tolist() == [0.75, 0.25]
    assert diversity.shares([3, 1], total=8).tolist() == [0.375, 0.125]
    assert np.isnan(diversity.shares([0, 0])).all()


@pytest.mark.parametrize(("count", "total"), [(84, 100), (0, 256), (256, 256), (1, 3), (61, 80)])
def test_interval_is_scipy_s_wilson_interval(count, total):
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert np.allclose(diversity.interval(count, total), expected, atol=2e-6)
    assert diversity.interval(0, 0) == (0.0, 1.0)


def test_total_variation():
    assert diversity.total_variation([1, 0], [0, 1]) == 1
    assert diversity.total_variation([0.2, 0.8], [0.2, 0.8]) == 0
    assert np.isclose(diversity.total_variation([0.7, 0.2, 0.1], [0.5, 0.5, 0.0]), 0.3)
    assert np.isnan(diversity.total_variation([np.nan, np.nan], [0.5, 0.5]))


def test_slope():
    assert np.isclose(diversity.slope([1.0, 1.5, 2.0, 2.5]), 0.5)
    assert np.isclose(diversity.slope([0.0, 1.0, 0.0]), 0.0)
    assert np.isclose(diversity.slope([3.0, np.nan, 1.0]), -1.0)  # a gap keeps its place
    assert np.isnan(diversity.slope([2.0])) and np.isnan(diversity.slope([]))
    noisy = np.random.default_rng(0).normal(size=20)
    assert np.isclose(diversity.slope(noisy), np.polyfit(np.arange(20), noisy, 1)[0])


def test_gap_by_hand():
    """Counts 6, 2 and none of 8; optimum 1/2, 1/4, 1/4: log 2 is the only logarithm but that of the half count."""
    optimum = np.log([0.5, 0.25, 0.25])
    got = diversity.gap([6, 2, 0], optimum)
    share = np.array([6, 2, 0.5]) / 8.5
    assert got["tv_optimum"] == pytest.approx(0.25) and got["tv_uniform"] == pytest.approx(0.25)
    assert got["kl_to_optimum"] == pytest.approx(share @ (np.log(share) - optimum))
    assert got["kl_from_optimum"] == pytest.approx(np.exp(optimum) @ (optimum - np.log(share)))
    even = diversity.gap([4, 2, 2], optimum)
    assert [even[name] for name in ("kl_to_optimum", "kl_from_optimum", "tv_optimum")] == pytest.approx([0, 0, 0])
    assert even["tv_uniform"] == pytest.approx(0.25)  # the two without an answer are not uniform over answers
    assert diversity.gap([1, 1, 0], np.log([0.25, 0.25, 0.5]))["kl_to_optimum"] == pytest.approx(
        0.8 * np.log(0.4 / 0.25) + 0.2 * np.log(0.2 / 0.5)
    )


def test_gap_keeps_masses_that_a_float_loses():
    assert diversity.gap([5, 4, 1], [np.log(0.5), np.log(0.5), -1000.0])["kl_to_optimum"] == pytest.approx(
        0.5 * np.log(1) + 0.4 * np.log(0.8) + 0.1 * (np.log(0.1) + 1000)
    )
    assert np.isnan(diversity.gap([0, 0, 0], np.log([0.5, 0.4, 0.1]))["tv_optimum"])


def test_coverage_by_hand():
    good = np.array([True, True, True, True, False])
    logp = np.log(np.array([[0.2, 0.2, 0.2, 0.2, 0.2], [0.5, 1e-30, 1e-30, 1e-30, 0.5], [0.3, 0.3, 1e-30, 1e-30, 0.4]]))
    np.testing.assert_allclose(diversity.coverage(logp, good), [1, 1 / 4, 1 / 2], rtol=1e-6)
    assert np.isnan(diversity.coverage(logp[0], np.zeros(5, bool)))


@pytest.mark.parametrize("count, good, k", [(4, 2, 5), (4, 2, 0), (4, 5, 2), (0, 0, 1)])
def test_pass_at_k_of_more_than_there_are_is_refused(count, good, k):
    with pytest.raises(ValueError, match=rf"pass@{k} of {count} samples, {good} of them good"):
        diversity.pass_at_k(count, good, k)
