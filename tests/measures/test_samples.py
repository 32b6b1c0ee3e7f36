"""Measures of answers against enumeration, hand arithmetic and known distributions."""

import collections
import itertools
import math

import numpy as np
import pytest

from mara_jax.core import diversity
from mara_jax.measures import samples


def by_enumeration(counts, value, k, unanswered):
    """Mean over all subsets of k samples of the mean value of the answers with the most votes."""
    pool = [answer for answer, count in enumerate(counts) for _ in range(count)] + [None] * unanswered
    worth = []
    for subset in itertools.combinations(pool, k):
        votes = collections.Counter(answer for answer in subset if answer is not None)
        most = max(votes.values(), default=0)
        winners = [value[answer] for answer, count in votes.items() if count == most]
        worth.append(np.mean(winners) if winners else 0.0)
    return np.mean(worth)


@pytest.mark.parametrize(
    ("counts", "value", "unanswered"),
    [
        ([3, 2, 1], [1, 0, 0], 0),
        ([1, 1, 1, 1, 1], [0, 1, 0, 1, 0], 2),
        ([4, 3, 0, 2], [0, 1, 1, 0.5], 1),
        ([2, 2, 2], [1, 0, 0.25], 3),
        ([6], [1], 4),
        ([], [], 3),
    ],
)
def test_majority_is_the_mean_over_all_subsets(counts, value, unanswered):
    for k in range(1, sum(counts) + unanswered + 1):
        expected = by_enumeration(counts, value, k, unanswered)
        assert samples.majority_at_k(counts, value, k, unanswered) == pytest.approx(expected, abs=1e-12), k


def test_majority_by_hand():
    """Of "a a b": two of three drawn are aa (a wins) or, twice, ab (a tie); all three choose a."""
    assert samples.majority_at_k([2, 1], [1, 0], 1) == pytest.approx(2 / 3)
    assert samples.majority_at_k([2, 1], [1, 0], 2) == pytest.approx(1 / 3 + 2 / 3 / 2)
    assert samples.majority_at_k([2, 1], [1, 0], 3) == pytest.approx(1)
    # Two samples without an answer: they do not vote, and a pair of them chooses nothing.
    assert samples.majority_at_k([1], [1], 2, unanswered=2) == pytest.approx(2 / 3)


def test_majority_of_many_samples_keeps_its_precision():
    """Two answers, 600 against 424, odd k: exact with Python's integers."""
    n, right, k = 1024, 600, 51
    ways = sum(math.comb(right, j) * math.comb(n - right, k - j) for j in range(26, 52))
    assert samples.majority_at_k([right, n - right], [1, 0], k) == pytest.approx(ways / math.comb(n, k), rel=1e-10)


@pytest.mark.parametrize("k", [0, 5])
def test_majority_refuses_votes_that_there_are_not(k):
    with pytest.raises(ValueError, match=f"k={k} votes of 4 samples"):
        samples.majority_at_k([3], [1], k, unanswered=1)


def test_values_of_answers():
    got = samples.answer_values(["a", None, "b", "a", "a"], [True, True, False, False, True])
    assert got == {"a": (3, pytest.approx(2 / 3)), "b": (1, 0.0)}


def test_distinct_and_effective_answers():
    assert samples.distinct([3, 0, 1]) == 2 and samples.distinct([]) == 0
    assert samples.effective([2, 2, 2, 2]) == pytest.approx(4) and samples.effective([7, 0]) == 1
    # Shares 1/2, 1/4, 1/4 have 1.5 bits.
    assert samples.effective([2, 1, 1]) == pytest.approx(2**1.5) == 2 ** diversity.entropy_bits([2, 1, 1])
    assert samples.effective([]) == samples.effective([0, 0]) == 0


def test_unseen_mass_by_hand():
    assert samples.unseen_mass([5, 1, 1, 2, 0]) == pytest.approx(2 / 9)
    assert samples.unseen_mass([5, 1, 1, 2, 0], total=12) == pytest.approx(2 / 12)  # three have no answer
    assert samples.unseen_mass([4, 4]) == 0 and samples.unseen_mass([]) == 1


def test_unseen_mass_is_unbiased_for_one_sample_less():
    """The mean of N1 / n is the mass unseen after n - 1 draws: sum p (1 - p)^(n - 1)."""
    share, n = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]), 8
    drawn = np.random.default_rng(0).multinomial(n, share, size=20000)
    expected = np.sum(share * (1 - share) ** (n - 1))
    got = [samples.unseen_mass(counts) for counts in drawn]
    error = np.std(got) / 20000**0.5
    assert np.mean(got) == pytest.approx(expected, abs=4 * error) and 4 * error < 0.05 * expected
