"""A threshold that moves: a percentile of the rewards of earlier batches, which a window of fixed shape holds.

The window never has the batch at hand in it, so that the signal of a batch does not depend on the batch: given the
window, the expected gradient is that of the objective at a constant threshold. Over many steps no fixed objective is
maximised, see docs/moving_thresholds.md.
"""

import fractions

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mara_jax.core.targets import Scalar

LEAST_GOOD = 2  # completions of a group that must be good on average: a lone one has no other to be weighed against
FINEST = 10_000  # percentiles are rounded to fractions with at most this denominator, so that ranks are exact


def empty(steps: int, rewards: int) -> Float[Array, "w n"]:
    """A window before the first batch.

    Args:
        steps: how many of the latest batches it holds.
        rewards: of a batch.

    Returns:
        -inf everywhere, which stands for no reward.
    """
    return jnp.full((steps, rewards), -jnp.inf, jnp.float32)


def with_batch(
    window_wn: Float[Array, "w n"],
    reward_pg: Float[Array, "p g"],
    counted_pg: Float[Array, "p g"] | None = None,
) -> Float[Array, "w n"]:
    """The window after a batch, whose rewards take the place of the oldest ones.

    Args:
        window_wn: of the batches before, the newest last.
        reward_pg: of the batch, p g = n.
        counted_pg: 0 for a completion that is left out of the update; None where all count.

    Returns:
        The new window; what is left out is no reward.
    """
    if counted_pg is not None:
        reward_pg = jnp.where(counted_pg > 0, reward_pg, -jnp.inf)
    newest_n = jnp.ravel(reward_pg).astype(window_wn.dtype)
    return jnp.concatenate([window_wn[1:], newest_n[None]])


def threshold(window_wn: Float[Array, "w n"], percentile: float, floor: Scalar) -> Float[Array, ""]:
    """The reward from which a completion of the next batch is good.

    It is the largest of three: the floor; the k-th largest of the window's m rewards, where k is (1 - percentile / 100)
    m, rounded up; and the smallest of them that is above the least one. So it depends on the rewards as a multiset
    alone: neither on their order, nor on how devices share them.

    Args:
        window_wn: rewards of the batches before, -inf for none.
        percentile: between 0 and 100 (static).
        floor: no reward below it is good (reward units; traced).

    Returns:
        Reward units. +inf, so that no completion is good, where the window holds no reward or only equal ones.
    """
    reward_m = jnp.sort(jnp.ravel(window_wn))
    known_m = reward_m > -jnp.inf
    count = jnp.sum(known_m)
    rank = rank_of(count, percentile)
    at_rank = jnp.where(count > 0, reward_m[jnp.clip(reward_m.size - rank, 0, reward_m.size - 1)], jnp.inf)
    least = jnp.min(jnp.where(known_m, reward_m, jnp.inf))
    second = jnp.min(jnp.where(reward_m > least, reward_m, jnp.inf))
    return jnp.maximum(jnp.maximum(at_rank, second), floor)


def rank_of(count: Int[Array, ""], percentile: float) -> Int[Array, ""]:
    """(1 - percentile / 100) count, rounded up and at least 1, in whole numbers: the percentile's place from above.

    Args:
        count: of rewards, any number that int32 holds.
        percentile: between 0 and 100 (static).

    Returns:
        From 1.
    """
    share = good_share(percentile)
    above, whole = share.numerator, share.denominator
    # Exact, and no product leaves int32: the denominator is at most FINEST.
    rank = (count // whole) * above + ((count % whole) * above + whole - 1) // whole
    return jnp.maximum(rank, 1)


def good_share(percentile: float) -> fractions.Fraction:
    """The share of the window's rewards from the percentile on, as a fraction.

    Args:
        percentile: between 0 and 100, as written in decimals: 90 gives 1/10.

    Returns:
        Between 0 and 1.
    """
    return (1 - fractions.Fraction(repr(float(percentile))) / 100).limit_denominator(FINEST)


def groups_with_two(
    reward_pg: Float[Array, "p g"], threshold: Scalar, counted_pg: Float[Array, "p g"] | None = None
) -> Float[Array, ""]:
    """Share of the groups with at least two good completions: MARA tells good ones of one prompt apart.

    Args:
        reward_pg: of each completion.
        threshold: reward from which one is good.
        counted_pg: 0 for a completion that is left out of the update; None where all count.

    Returns:
        From 0 to 1.
    """
    good_pg = reward_pg >= threshold
    if counted_pg is not None:
        good_pg &= counted_pg > 0
    return jnp.mean((jnp.sum(good_pg, axis=-1) >= LEAST_GOOD).astype(jnp.float32))
