"""NoveltyBench's two measures of the first k completions of a prompt: distinct_k and utility_k."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mara_jax.measures.equivalence import Equivalence, partition

PATIENCE = 0.8


class Novelty(NamedTuple):
    """What a user who reads k completions sees: classes and utility, and the name of the rule that they rest on."""

    rule: str
    k: int
    distinct: int
    utility: float


def distinct_k(class_g: Sequence[int], k: int) -> int:
    """How many classes the first k completions are in.

    Args:
      class_g: [g] class of each completion, as of `equivalence.partition`; k: from 1 to g.

    Raises:
      ValueError: k is not between 1 and g.
    """
    _check(class_g, k)
    return len(set(class_g[:k]))


def utility_k(class_g: Sequence[int], utility_g: ArrayLike, k: int, patience: float = PATIENCE) -> float:
    """Discounted mean utility of the first k completions, where one of a class that was seen before is worth nothing.

    Args:
      class_g: [g] class of each completion; utility_g: [g] what each is worth to a user: the benchmark's are whole
        numbers from 1 to 10, of a reward model.
      k: from 1 to g.
      patience: p, the chance that the user reads on after each completion, from 0 to 1.

    Returns:
      (1 - p) / (1 - p^k) sum_i p^(i - 1) 1[the i-th begins a class] u_i, in the unit of the utilities; the plain mean
      over k for p = 1.

    Raises:
      ValueError: k is not between 1 and g, p is outside [0, 1], or not as many utilities as classes.

    Source:
      Zhang et al. 2025, arXiv 2504.05228, section 3.
    """
    _check(class_g, k)
    utility_g = np.asarray(utility_g, np.float64)
    if utility_g.shape != (len(class_g),):
        raise ValueError(f"utilities of shape {utility_g.shape} for {len(class_g)} completions: give one for each")
    if not 0 <= patience <= 1:
        raise ValueError(f"patience={patience} must be from 0 to 1: it is the chance to read on")
    new_k = [number not in class_g[:place] for place, number in enumerate(class_g[:k])]
    return float(np.average(utility_g[:k] * new_k, weights=np.power(float(patience), np.arange(k))))


def novelty(
    prompt: str,
    completions: Sequence[str],
    utility_g: ArrayLike,
    rule: Equivalence,
    k: int | None = None,
    patience: float = PATIENCE,
) -> Novelty:
    """Both measures of one prompt's completions; a benchmark's number is the mean over its prompts.

    Args:
      completions: [g] in the order in which they were drawn.
      utility_g: [g] of each; patience: as of `utility_k`.
      rule: when two are the same.
      k: how many are read, by default all.

    Raises:
      ValueError: as of `utility_k`.
    """
    k = len(completions) if k is None else k
    class_g = partition(prompt, completions, rule).class_g
    return Novelty(rule.name, k, distinct_k(class_g, k), utility_k(class_g, utility_g, k, patience))


def _check(class_g: Sequence[int], k: int) -> None:
    if not 1 <= k <= len(class_g):
        raise ValueError(f"k={k} of {len(class_g)} completions: choose k from 1 to {len(class_g)}")
