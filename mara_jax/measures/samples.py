"""Measures of the answers of one prompt's completions: majority@k, distinct and effective answers, unseen mass."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mara_jax.core import diversity


def majority_at_k(counts: ArrayLike, value: ArrayLike, k: int, unanswered: int = 0) -> float:
    """Expected value of the answer that a majority vote among k of the samples chooses, unbiased.

    The k samples are drawn without replacement. A sample without an answer casts no vote; where none of the k has an
    answer the value is 0. Among answers with equally many votes one is chosen at random, each with the same chance.

    Args:
      counts: [a] how many samples gave each answer.
      value: [a] value of choosing it: 1 for a right answer, 0 for a wrong one, or anything in between.
      k: votes, from 1 to the number of samples.
      unanswered: samples without an answer.

    Returns:
      The mean over all subsets of k samples, exact, in the unit of `value`. For k = 1 it is the mean value of a sample.

    Raises:
      ValueError: k is not between 1 and the number of samples, or a count is negative.

    Source:
      Self-consistency, Wang et al., arXiv 2203.11171; without bias as pass@k is in arXiv 2107.03374.
    """
    counts, value = np.asarray(counts, np.int64), np.asarray(value, np.float64)
    total = int(counts.sum()) + unanswered
    if counts.shape != value.shape or (counts < 0).any() or unanswered < 0:
        raise ValueError(f"counts {counts.shape} and values {value.shape} must be as many, and no count negative")
    if not 1 <= k <= total:
        raise ValueError(f"k={k} votes of {total} samples: choose k from 1 to {total}")
    value, counts = value[counts > 0], counts[counts > 0]
    # Every sample is kept by a coin of chance k / total. Given that k are kept, they are a uniform subset, so each
    # count is binomial: numbers stay within floats where products of binomial coefficients would not.
    chance, most = k / total, min(k, max(counts, default=0))
    won = [_won_with(votes, counts, value, k, unanswered, chance) for votes in range(1, most + 1)]
    return float(sum(won) / _binomial(total, chance)[k])


def _won_with(votes: int, counts: np.ndarray, value: np.ndarray, k: int, unanswered: int, chance: float) -> float:
    """Expected value of the winner times the probability that it has exactly `votes` votes and that k are kept.

    The answers that may have as many are added one by one: ways[t, j] is the probability that t of them have `votes`
    votes, the others fewer, and that j samples are kept in all; worth[t, j] is the same, weighted by the sum of the
    values of those t. Answers with fewer samples cannot win, so they are pooled with the samples that have no answer.
    """
    able, most = counts >= votes, k // votes
    ways, worth = np.zeros((most + 1, k + 1)), np.zeros((most + 1, k + 1))
    others = _binomial(unanswered + int(counts[~able].sum()), chance)[: k + 1]
    ways[0, : len(others)] = others
    for count, own in zip(counts[able], value[able], strict=True):
        share = _binomial(int(count), chance)
        new_ways, new_worth = _spread(ways, share[:votes]), _spread(worth, share[:votes])
        new_ways[1:, votes:] += share[votes] * ways[:-1, :-votes]
        new_worth[1:, votes:] += share[votes] * (worth + own * ways)[:-1, :-votes]
        ways, worth = new_ways, new_worth
    return float(np.sum(worth[1:, k] / np.arange(1, most + 1)))


def _spread(mass: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Each row convolved with `share`, cut to its length."""
    spread = np.zeros_like(mass)
    for votes, part in enumerate(share[: mass.shape[1]]):
        spread[:, votes:] += part * mass[:, : mass.shape[1] - votes]
    return spread


def _binomial(count: int, chance: float) -> np.ndarray:
    """[count + 1] probabilities of 0, 1, ... of `count` coins."""
    if chance == 1:
        return np.eye(count + 1)[count]
    place = np.arange(count + 1)
    ways = [math.lgamma(count + 1) - math.lgamma(j + 1) - math.lgamma(count - j + 1) for j in range(count + 1)]
    return np.exp(ways + place * math.log(chance) + (count - place) * math.log1p(-chance))


def answer_values(answers: Sequence[str | None], good: Sequence[bool]) -> dict[str, tuple[int, float]]:
    """Count of each answer, and the share of its completions that are good: what `majority_at_k` takes.

    Args:
      answers: [g] of each completion, None for none; good: [g] whether its reward reaches the threshold.

    Returns:
      answer -> (count, share), in the order in which answers appear.
    """
    rows: dict[str, list[bool]] = {}
    for answer, right in zip(answers, good, strict=True):
        if answer is not None:
            rows.setdefault(answer, []).append(bool(right))
    return {answer: (len(right), sum(right) / len(right)) for answer, right in rows.items()}


def distinct(counts: ArrayLike) -> int:
    """How many different answers were given; counts: [a]."""
    return int(np.count_nonzero(np.asarray(counts)))


def effective(counts: ArrayLike) -> float:
    """Effective number of answers, exp of their entropy: as many equally frequent answers would have that entropy.

    Args:
      counts: [a] count (or mass) of each answer.

    Returns:
      From 1 to the number of answers that were given; 0 where nothing was counted.

    Source:
      The Hill number of order 1, Hill 1973; `core.diversity.entropy_bits` is its logarithm to the base 2.
    """
    return 2 ** diversity.entropy_bits(counts) if np.asarray(counts).sum() else 0.0


def unseen_mass(counts: ArrayLike, total: int | None = None) -> float:
    """Good-Turing estimate of the probability that the next sample gives an answer that none has given yet.

    Args:
      counts: [a] how often each answer was given.
      total: samples; by default the counts' sum. With samples that have no answer, the number of all.

    Returns:
      The share of the samples whose answer was given once; 1 where there are no samples: nothing was seen. Its bias is
      at most 1 / total.

    Source:
      Good 1953, The population frequencies of species; the bias: McAllester and Schapire 2000.
    """
    counts = np.asarray(counts)
    total = int(counts.sum()) if total is None else total
    return int(np.sum(counts == 1)) / total if total else 1.0
