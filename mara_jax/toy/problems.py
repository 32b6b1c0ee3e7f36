"""The didactic problems: a reference and rewards over 100 outcomes (figures 2, 4, 5 and 6 of the paper), or over a few.

Figure numbers are those of the first version; "iclr" marks those of the published one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

OUTCOMES = 100


class Problem(NamedTuple):
    """One enumerated problem, in float64.

    `ref_logp` holds the reference's log-probabilities (nats), `reward` the rewards, `threshold` the reward
    from which an outcome counts as good in MARA.
    """

    name: str
    ref_logp: np.ndarray
    reward: np.ndarray
    threshold: float


def _log_normalised(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits)


def _half_supported() -> np.ndarray:
    """Logits 1.9 on the first half and 0 on the second: log-probabilities -4.0514 and -5.9514."""
    return _log_normalised(np.where(np.arange(OUTCOMES) < OUTCOMES // 2, 1.9, 0.0))


def _two_bumps(left: float, right: float) -> np.ndarray:
    """Gaussian bumps of the given heights at .2 and .8, standard deviation .05, on the axis i / 99."""
    x = np.arange(OUTCOMES) / (OUTCOMES - 1)
    return left * np.exp(-(((x - 0.2) / 0.05) ** 2) / 2) + right * np.exp(-(((x - 0.8) / 0.05) ** 2) / 2)


def figure2(left: float = 0.75) -> Problem:
    """The reference on the left half, rewards .75 (left) and 1 (right).

    Args:
        left: height of the left bump.

    Returns:
        The problem on which the optimum flips sides at beta = .25 / 1.9 under reverse KL.
    """
    return Problem("figure2", _half_supported(), _two_bumps(left, 1.0), left - 0.05)


def figure3() -> Problem:
    """Two outcomes equally likely under the reference, rewards .9 and 1.

    Returns:
        The problem on which a reward .1 higher makes an outcome exp(.1 / beta) times likelier.
    """
    return Problem("figure3", np.log([0.5, 0.5]), np.array([0.9, 1.0]), 0.8)


def figure4(left: float = 0.75) -> Problem:
    """A uniform reference, bumps of `left` and 1.

    Args:
        left: height of the left bump; the figure shows .75, or .9.

    Returns:
        The problem on which small beta leaves only the best mode.
    """
    # A little under the left height: no outcome lies exactly on a bump's centre.
    return Problem("figure4", np.full(OUTCOMES, -np.log(OUTCOMES)), _two_bumps(left, 1.0), left - 0.05)


def figure5() -> Problem:
    """The reference of figure 2, both bumps 1.

    Returns:
        The problem on which the reference's ratio, exp(1.9), stays at every beta.
    """
    return Problem("figure5", _half_supported(), _two_bumps(1.0, 1.0), 0.8)


def figure6() -> Problem:
    """A reference falling as (1 - i/100)^4, reward 1 on outcomes 0-24 and 50-74.

    Returns:
        The problem on which MARA makes all fifty good outcomes equal.
    """
    index = np.arange(OUTCOMES)
    reward = np.where((index < 25) | ((index >= 50) & (index < 75)), 1.0, 0.0)
    return Problem("figure6", _log_normalised(4 * np.log1p(-index / OUTCOMES)), reward, 0.8)


def iclr3() -> Problem:
    """Three outcomes equally likely under the reference, rewards 0, .9 and 1.

    Returns:
        The problem on which a small beta separates two almost equal rewards.
    """
    return Problem("iclr3", np.log(np.full(3, 1 / 3)), np.array([0.0, 0.9, 1.0]), 0.8)


def iclr4() -> Problem:
    """Reference .68, .30 and .02, rewards 0, 1 and 1.

    Returns:
        The problem on which two right outcomes keep the reference's ratio, 15, at every beta.
    """
    return Problem("iclr4", np.log([0.68, 0.30, 0.02]), np.array([0.0, 1.0, 1.0]), 0.8)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "figure2": figure2,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
    "iclr3": iclr3,
    "iclr4": iclr4,
}
