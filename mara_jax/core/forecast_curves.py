"""Shares of answers, intervals and crossings of an optimum over a grid of betas, from the masses of answers."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

COLLAPSED = 0.95  # share of the completions with an answer from which one answer counts as the only one
_LEVEL = 1e-4  # nats: values closer to zero than rounding have no sign


class Curves(NamedTuple):
    """An optimum over a grid of betas; `low` and `high` are the ends of 95 % intervals.

    `mass` of each class; `share` of each answer among the completions that have one; `number` the effective number
    of answers, exp of the entropy of `share`; `top` the largest share.
    """

    mass: Float[np.ndarray, "b c"]
    mass_low: Float[np.ndarray, "b c"]
    mass_high: Float[np.ndarray, "b c"]
    share: Float[np.ndarray, "b a"]
    share_low: Float[np.ndarray, "b a"]
    share_high: Float[np.ndarray, "b a"]
    number: Float[np.ndarray, " b"]
    number_low: Float[np.ndarray, " b"]
    number_high: Float[np.ndarray, " b"]
    top: Float[np.ndarray, " b"]
    top_low: Float[np.ndarray, " b"]
    top_high: Float[np.ndarray, " b"]


def summarise(mass_brc: Float[np.ndarray, "b r c"], resamples: int) -> Curves:
    """Shares, effective numbers and intervals of an optimum, from its masses.

    The values are those of row 0; the intervals are the 2.5 % and 97.5 % quantiles of the resamples, widened to the
    rows after the resamples.

    Args:
        mass_brc: as from `core.forecast.class_mass`.
        resamples: how many of the rows are resamples.

    Returns:
        The curves.
    """
    mass_brc = np.asarray(mass_brc, np.float64)
    valid_br1 = mass_brc[..., :-1].sum(axis=-1, keepdims=True)
    share_bra = mass_brc[..., :-1] / np.where(valid_br1 > 0, valid_br1, 1.0)
    number_br = np.exp(-np.sum(share_bra * np.log(np.where(share_bra > 0, share_bra, 1.0)), axis=-1))
    top_br = share_bra.max(axis=-1)
    ends = [end for value in (mass_brc, share_bra, number_br, top_br) for end in _ends(value, resamples)]
    return Curves(*ends)


def _ends(value_br: np.ndarray, resamples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not resamples:
        return value_br[:, 0], value_br[:, 0], value_br[:, 0]
    low, high = np.quantile(value_br[:, 1 : resamples + 1], [0.025, 0.975], axis=1)
    unseen_br = value_br[:, resamples + 1 :]
    if unseen_br.shape[1]:
        low, high = np.minimum(low, unseen_br.min(axis=1)), np.maximum(high, unseen_br.max(axis=1))
    return value_br[:, 0], low, high


def crossings(beta_b: Float[np.ndarray, " b"], value_b: Float[np.ndarray, " b"]) -> list[float]:
    """The betas at which a curve changes its sign, interpolated in 1 / beta.

    The reverse KL's log-ratio of two outcomes is linear in 1 / beta (Eq. 8), so for these the betas are exact.

    Args:
        beta_b: betas in ascending order.
        value_b: the curve (nats); where it lies within rounding of 0 it has no sign.

    Returns:
        Betas in ascending order; none where the sign never changes.
    """
    inverse, value = 1.0 / np.asarray(beta_b, np.float64), np.asarray(value_b, np.float64)
    at = np.flatnonzero(np.isfinite(value) & (np.abs(value) > _LEVEL))
    inverse, value = inverse[at], value[at]
    before = np.flatnonzero(np.sign(value[:-1]) != np.sign(value[1:]))
    part = value[before] / (value[before] - value[before + 1])
    return (1.0 / (inverse[before] + part * (inverse[before + 1] - inverse[before]))).tolist()


def beta_grid(reward_n: np.ndarray, beta: float, count: int = 61) -> np.ndarray:
    """Betas from a thousandth to ten times the spread of the rewards (1 if they are equal), evenly in log.

    Args:
        reward_n: reward of each sample.
        beta: a beta that the grid contains, with smaller and larger ones.
        count: number of other betas.

    Returns:
        Betas in ascending order.
    """
    spread = float(np.ptp(reward_n)) or 1.0
    low, high = min(spread / 1000, beta / 3), max(10 * spread, 3 * beta)
    return np.unique(np.append(np.geomspace(low, high, count), beta))


def log_odds_above(top: Float[np.ndarray, "*n"], level: float = COLLAPSED) -> Float[np.ndarray, "*n"]:
    """Log-odds of a share less those of `level` (nats): positive where the share is above it."""
    top = np.clip(np.asarray(top, np.float64), 1e-300, None)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(top) - np.log1p(-top), -1e3, 1e3) - np.log(level / (1 - level))


def crossing_interval(
    beta: float, beta_b: Float[np.ndarray, " b"], value_rb: Float[np.ndarray, "r b"]
) -> tuple[float | None, float | None, float]:
    """Bootstrap interval of a crossing, from the crossing of each resample's curve that is nearest to it.

    Args:
        beta: the crossing of the samples' own curve.
        beta_b: betas in ascending order.
        value_rb: the curve of each resample.

    Returns:
        2.5 % and 97.5 % quantiles of the betas, None where no resample crosses, and the share of resamples that do.
    """
    betas_r = [crossings(beta_b, value_b) for value_b in value_rb]
    nearest = [min(betas, key=lambda other: abs(np.log(other / beta))) for betas in betas_r if betas]
    if not nearest:
        return None, None, 0.0
    low, high = np.quantile(nearest, [0.025, 0.975])
    return float(low), float(high), len(nearest) / len(betas_r)


class Leader(NamedTuple):
    """The likeliest answer at one beta: its `index`, its `share` of the completions with an answer, and the interval
    `low` to `high` of the largest share; `raise_above`, the next larger beta at which the largest share crosses
    COLLAPSED, or None.
    """

    index: int
    share: float
    low: float
    high: float
    raise_above: float | None


def leader(curves: Curves, beta_b: Float[np.ndarray, " b"], beta: float) -> Leader:
    """The likeliest answer at one beta.

    Args:
        curves: of the optimum.
        beta_b: their betas, in ascending order.
        beta: one of them.

    Returns:
        The leader.
    """
    own = int(np.argmin(np.abs(beta_b - beta)))
    beyond = [other for other in crossings(beta_b, log_odds_above(curves.top)) if other > beta]
    return Leader(
        int(np.argmax(curves.share[own])),
        float(curves.top[own]),
        float(curves.top_low[own]),
        float(curves.top_high[own]),
        float(beyond[0]) if beyond else None,
    )
