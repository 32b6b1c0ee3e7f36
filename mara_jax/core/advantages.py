"""Advantages: each sample's reward minus a baseline of its group, [prompts, samples] in and out."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Advantage = Callable[[Float[Array, "p g"]], Float[Array, "p g"]]

# Keeps the advantages of a group of equal rewards at zero, where both the difference and the deviation are rounding
# errors.
_STD_EPSILON = 1e-4


def none(reward_pg: Float[Array, "p g"]) -> Float[Array, "p g"]:
    """No baseline (Algorithm 1, line 13): the reward itself.

    Args:
        reward_pg: reward of each sample, the KL penalty included where it belongs to the reward.

    Returns:
        The same array.
    """
    return reward_pg


def mean(reward_pg: Float[Array, "p g"]) -> Float[Array, "p g"]:
    """Reward minus its group's mean: in expectation the gradient times (g - 1) / g.

    Args:
        reward_pg: reward of each sample.

    Returns:
        Advantages that sum to zero in every group (reward units).
    """
    return reward_pg - jnp.mean(reward_pg, axis=-1, keepdims=True)


def leave_one_out(reward_pg: Float[Array, "p g"]) -> Float[Array, "p g"]:
    """Reward minus the mean of the other samples of its group (RLOO): it leaves the mean gradient unchanged.

    Args:
        reward_pg: reward of each sample; at least two samples a group.

    Returns:
        Advantages that sum to zero in every group (reward units).

    Raises:
        ValueError: for groups of one sample.
    """
    group = reward_pg.shape[-1]
    if group < 2:
        raise ValueError(f"leave_one_out needs groups of at least 2 samples, not {group}: enlarge the group")
    return mean(reward_pg) * (group / (group - 1))


def group_normalised(reward_pg: Float[Array, "p g"]) -> Float[Array, "p g"]:
    """Reward minus its group's mean, over the group's standard deviation (GRPO).

    The deviation is the sample's (divisor g - 1), as in the public implementations. Its scale differs from
    group to group, so the expected gradient is not that of any E[R] - beta KL. A free policy whose penalty is part of
    this reward still ends at the stated optimum, where all returns are equal; with the KL as a term of its own, or
    on a policy that cannot reach the optimum, it ends elsewhere (docs/rivals.md).

    Args:
        reward_pg: reward of each sample; at least two samples a group.

    Returns:
        Advantages without a unit; zero for a group of equal rewards.

    Raises:
        ValueError: for groups of one sample.
    """
    group = reward_pg.shape[-1]
    if group < 2:
        raise ValueError(f"group_normalised needs groups of at least 2 samples, not {group}: enlarge the group")
    return mean(reward_pg) / (jnp.std(reward_pg, axis=-1, ddof=1, keepdims=True) + _STD_EPSILON)


BY_NAME: dict[str, Advantage] = {
    "none": none,
    "mean": mean,
    "leave_one_out": leave_one_out,
    "group_normalised": group_normalised,
}
