"""Modifiers: what turns a property or a similarity into a score from 0 to 1; and means of scores.

Clipped and Gaussian modifiers are those of GuacaMol (Brown et al. 2019), sigmoids and steps those of REINVENT.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Modifier = Callable[[float], float]


def unchanged(value: float) -> float:
    """The value itself, for measures that are scores already."""
    return value


@dataclass(frozen=True)
class Clipped:
    """Rises linearly from 0 at 0 to 1 at `upper`, and stays there."""

    upper: float

    def __call__(self, value: float) -> float:
        return min(max(value / self.upper, 0.0), 1.0)


@dataclass(frozen=True)
class Gaussian:
    """1 at `mean`, falling on both sides with standard deviation `sd`."""

    mean: float
    sd: float

    def __call__(self, value: float) -> float:
        return math.exp(-0.5 * ((value - self.mean) / self.sd) ** 2)


@dataclass(frozen=True)
class MinGaussian:
    """1 up to `mean`, falling above it: for what should be small."""

    mean: float
    sd: float

    def __call__(self, value: float) -> float:
        return 1.0 if value <= self.mean else Gaussian(self.mean, self.sd)(value)


@dataclass(frozen=True)
class MaxGaussian:
    """1 from `mean` on, falling below it: for what should be large."""

    mean: float
    sd: float

    def __call__(self, value: float) -> float:
        return 1.0 if value >= self.mean else Gaussian(self.mean, self.sd)(value)


@dataclass(frozen=True)
class Sigmoid:
    """Rises from `low` to `high`: .5 halfway between, 1 / (1 + 10^(-5 k)) at `high`, with k the `steepness`."""

    low: float
    high: float
    steepness: float = 0.25

    def __call__(self, value: float) -> float:
        middle = (self.low + self.high) / 2
        return _logistic(10 * self.steepness * (value - middle) / (self.high - self.low))


@dataclass(frozen=True)
class ReverseSigmoid:
    """Falls from `low` to `high`: 1 minus `Sigmoid`."""

    low: float
    high: float
    steepness: float = 0.25

    def __call__(self, value: float) -> float:
        middle = (self.low + self.high) / 2
        return _logistic(-10 * self.steepness * (value - middle) / (self.high - self.low))


@dataclass(frozen=True)
class DoubleSigmoid:
    """Rises at `low` and falls at `high`: about .5 at both, 10^k times nearer to 0 or 1 for each unit from there.

    `rise` and `fall` are k of the two flanks, in 1 / unit of the property. REINVENT writes k as a quotient, 150 / 100.
    """

    low: float
    high: float
    rise: float = 1.5
    fall: float = 1.5

    def __call__(self, value: float) -> float:
        # Two logistic functions of opposite sign: their difference would lose all digits far above `high`.
        below, above = _logistic(self.rise * (value - self.low)), _logistic(-self.fall * (value - self.high))
        return max(below + above - 1, 0.0)


@dataclass(frozen=True)
class Step:
    """1 from `low` to `high`, both included, else 0."""

    low: float = -math.inf
    high: float = math.inf

    def __call__(self, value: float) -> float:
        return float(self.low <= value <= self.high)


def geometric_mean(scores: Sequence[float], weights: Sequence[float]) -> float:
    """exp(sum w log s / sum w); 0 where a score is 0."""
    if min(scores) <= 0:
        return 0.0
    logs = sum([weight * math.log(score) for score, weight in zip(scores, weights, strict=True)])
    return math.exp(logs / sum(weights))


def arithmetic_mean(scores: Sequence[float], weights: Sequence[float]) -> float:
    """sum w s / sum w."""
    return sum([weight * score for score, weight in zip(scores, weights, strict=True)]) / sum(weights)


MEANS = {"geometric": geometric_mean, "arithmetic": arithmetic_mean}


def _logistic(exponent: float) -> float:
    """1 / (1 + 10^-x), without overflow."""
    if exponent >= 0:
        return 1 / (1 + 10.0 ** -min(exponent, 300.0))
    power = 10.0 ** max(exponent, -300.0)
    return power / (1 + power)
