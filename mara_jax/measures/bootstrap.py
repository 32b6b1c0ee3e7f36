"""Bootstrap intervals over prompts, of one model's measure and of the difference of two on the same prompts."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
LEVEL = 0.95
_AT_ONCE = 1 << 20  # values drawn at once

Statistic = Callable[[np.ndarray], np.ndarray]  # of values [..., p] over their last axis: [...]


class Interval(NamedTuple):
    """A statistic of all prompts, and the bounds of its bootstrap interval, in the unit of the statistic."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The first model's statistic minus the second's, its bounds, and the share of resamples where it is at most 0."""

    value: float
    low: float
    high: float
    not_better: float


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return values.mean(axis=-1)


def interval(
    values_p: ArrayLike,
    statistic: Statistic = mean,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of prompts.

    Prompts are resampled with what was measured on them, so the interval covers both which prompts were asked and which
    completions were drawn. With few prompts it is too narrow: by a factor of sqrt(1 - 1 / p) for a mean, and more in
    the tails.

    Args:
      values_p: [p] a measure of each prompt, at least two.
      statistic: of [..., p] values over their last axis.
      level: share of the resamples between the bounds.
      resamples: how often p prompts are drawn with replacement.
      seed: key of the counter-based generator (Philox): more resamples leave the first ones as they are.

    Raises:
      ValueError: fewer than two prompts, a value that is not finite, a level outside (0, 1).

    Source:
      Efron 1979; Efron and Tibshirani 1993, section 13.3.
    """
    values_p = _checked(values_p, level)
    drawn = [statistic(values_p[rows]) for rows in _resampled(len(values_p), resamples, seed)]
    return Interval(float(statistic(values_p)), *_bounds(np.concatenate(drawn), level))


def difference(
    first_p: ArrayLike,
    second_p: ArrayLike,
    statistic: Statistic = mean,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Paired percentile bootstrap of the difference of two models that were measured on the same prompts.

    A resample takes the same prompts for both, so that what makes a prompt hard for both cancels.

    Args:
      first_p, second_p: [p] a measure of each prompt, prompt by prompt; the rest as of `interval`.

    Raises:
      ValueError: as of `interval`, or not as many prompts in both.

    Source:
      Koehn 2004, Statistical significance tests for machine translation evaluation.
    """
    first_p, second_p = _checked(first_p, level), _checked(second_p, level)
    if len(first_p) != len(second_p):
        raise ValueError(f"{len(first_p)} prompts against {len(second_p)}: measure both models on the same prompts")
    drawn = [statistic(first_p[rows]) - statistic(second_p[rows]) for rows in _resampled(len(first_p), resamples, seed)]
    gaps = np.concatenate(drawn)
    return Difference(float(statistic(first_p) - statistic(second_p)), *_bounds(gaps, level), float(np.mean(gaps <= 0)))


def _checked(values_p: ArrayLike, level: float) -> np.ndarray:
    values_p = np.asarray(values_p, np.float64)
    if values_p.ndim != 1 or len(values_p) < 2:
        raise ValueError(f"values of shape {values_p.shape}: a bootstrap over prompts needs one of each of two or more")
    if not np.isfinite(values_p).all():
        raise ValueError(f"{np.sum(~np.isfinite(values_p))} values are not finite: leave those prompts out")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1, as .95 is")
    return values_p


def _resampled(prompts: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """[r, p] numbers of prompts, part by part: the r-th row is a function of (seed, r) and the number of prompts."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    at_once = max(1, _AT_ONCE // prompts)
    for first in range(0, resamples, at_once):
        yield generator.integers(prompts, size=(min(at_once, resamples - first), prompts))


def _bounds(drawn: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
