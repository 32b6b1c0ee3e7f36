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
    on a policy that cannot reach the optimum, it ends elsewhere (docs/methods.md).

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


def mean_normalised(reward_pg: Float[Array, "p g"]) -> Float[Array, "p g"]:
    """Reward minus its group's mean, over that mean (MaxRL).

    Source: arXiv 2602.02710. With rewards of 0 and 1, success probability s and groups of N the expected
    gradient is (1 - (1 - s)^(N - 1)) / s times that of s: as N grows, that of log s.

    Args:
        reward_pg: reward of each sample, not negative.

    Returns:
        Advantages without a unit; zero for a group whose mean is zero.
    """
    mean_p1 = jnp.mean(reward_pg, axis=-1, keepdims=True)
    return jnp.where(mean_p1 > 0, mean(reward_pg) / jnp.where(mean_p1 > 0, mean_p1, 1), 0)


def best_minus_second(reward_pg: Float[Array, "p g"]) -> Float[Array, "p g"]:
    """What the best sample of a group adds to its maximum: largest minus second-largest reward; others get 0.

    It is the reward max over the group minus a leave-one-out baseline, the max over the others, so that the sum of
    advantage x grad log pi over a group has the expectation grad E[max] (pass@g where rewards are 0 and 1).

    Args:
        reward_pg: reward of each sample; at least two samples a group.

    Returns:
        Advantages (reward units); a group whose best is not unique gets zeros.

    Raises:
        ValueError: for groups of one sample.
    """
    if reward_pg.shape[-1] < 2:
        raise ValueError("best_minus_second needs groups of at least 2 samples, not 1: enlarge the group")
    two_p2 = jnp.sort(reward_pg, axis=-1)[..., -2:]
    largest_p1, second_p1 = two_p2[..., 1:], two_p2[..., :1]
    return jnp.where(reward_pg == largest_p1, largest_p1 - second_p1, 0)


def leave_one_out_of(counted_pg: Float[Array, "p g"]) -> Advantage:
    """`leave_one_out` among some samples of each group; the others get 0.

    With the finished completions as those samples the mean gradient is, up to a positive factor, that of
    E[signal | finished]: how often completions finish is neither rewarded nor penalised (docs/prompts.md).

    Args:
        counted_pg: 1 for a sample that counts, 0 for one that does not.

    Returns:
        The advantage function; a group with less than two samples that count gets zeros.
    """

    def advantage(reward_pg: Float[Array, "p g"]) -> Float[Array, "p g"]:
        count_p1 = jnp.sum(counted_pg, axis=-1, keepdims=True)
        kept_pg = jnp.where(counted_pg > 0, reward_pg, 0)
        mean_p1 = jnp.sum(kept_pg, axis=-1, keepdims=True) / jnp.maximum(count_p1, 1)
        scale_p1 = jnp.where(count_p1 > 1, count_p1 / jnp.maximum(count_p1 - 1, 1), 0)
        return jnp.where(counted_pg > 0, (reward_pg - mean_p1) * scale_p1, 0)

    return advantage


BY_NAME: dict[str, Advantage] = {
    "none": none,
    "mean": mean,
    "leave_one_out": leave_one_out,
    "group_normalised": group_normalised,
}
