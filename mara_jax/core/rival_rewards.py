"""The reward transforms of other methods, from their published formulas: (reward_pg, ...) -> reward_pg.

Each is used in the place of `core.augment`. docs/methods.md gives the optimum of each.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mara_jax.core import targets
from mara_jax.core.targets import Scalar

UNLIKELINESS = 0.25  # penalty of the likeliest completion of a group, as a share of its reward
LEAST_DIVERSITY = 0.1  # of DARLING


def unlikeliness(reward_pg: Float[Array, "p g"], mean_logp_pg: Float[Array, "p g"]) -> Float[Array, "p g"]:
    """Unlikeliness reward: R (1 - UNLIKELINESS rank / g), rank 0 the least likely of the group, g - 1 the likeliest.

    Source: arXiv 2506.02355 and its code (rank by the mean log-probability of a token). Equal log-probabilities are
    ranked by their index in the group.

    Args:
        reward_pg: reward of each completion.
        mean_logp_pg: mean log-probability of its tokens under the policy that sampled it (nats a token).

    Returns:
        Rewards (reward units).
    """
    rank_pg = jnp.argsort(jnp.argsort(mean_logp_pg, axis=-1, stable=True), axis=-1, stable=True)
    return reward_pg * (1 - UNLIKELINESS * rank_pg / reward_pg.shape[-1])


def _class_size(answer_pg):
    return jnp.sum(answer_pg[..., :, None] == answer_pg[..., None, :], axis=-1)


def darling(reward_pg: Float[Array, "p g"], answer_pg: Int[Array, "p g"]) -> Float[Array, "p g"]:
    """DARLING: reward times diversity, the share of the others in the group that are of another class.

    Source: arXiv 2509.02534, with known classes in place of its classifier.

    Args:
        reward_pg: reward of each completion; at least two a group.
        answer_pg: class of each completion; a negative index is a class like any other.

    Returns:
        Rewards (reward units).
    """
    group = reward_pg.shape[-1]
    return reward_pg * jnp.maximum((group - _class_size(answer_pg)) / (group - 1), LEAST_DIVERSITY)


def inverse_probability(reward_pg: Float[Array, "p g"], answer_pg: Int[Array, "p g"]) -> Float[Array, "p g"]:
    """IPS-GRPO's reward: divided by the frequency of its outcome in the group.

    Source: arXiv 2601.21669. With true probabilities instead of frequencies and no baseline the optimum is
    proportional to R; with g samples see docs/methods.md.

    Args:
        reward_pg: reward of each completion.
        answer_pg: outcome of each completion; a negative index is an outcome like any other.

    Returns:
        Rewards (reward units), at most g times the original.
    """
    return reward_pg * (reward_pg.shape[-1] / _class_size(answer_pg))


def entropy_bonus(reward_pg: Float[Array, "p g"], logp_pg: Float[Array, "p g"], *, eta: Scalar) -> Float[Array, "p g"]:
    """Reward plus eta times the completion's own -log pi, detached; in expectation this adds eta H(pi) exactly.

    Args:
        reward_pg: reward of each completion.
        logp_pg: log-probability of each whole completion under the policy (nats).
        eta: weight of the entropy (reward units a nat).

    Returns:
        Rewards (reward units).
    """
    return reward_pg - eta * jax.lax.stop_gradient(logp_pg)


def entropy_bonus_optimum(
    ref_logp: Float[Array, "*batch a"], reward: Float[Array, "*batch a"], beta: Scalar, eta: Scalar
) -> Float[Array, "*batch a"]:
    """Optimum of E[R] - beta KL(pi || ref) + eta H(pi): ref^(beta / (beta + eta)) exp(R / (beta + eta)).

    Args:
        ref_logp: reference log-probabilities (nats).
        reward: reward of each outcome.
        beta: regularisation strength, 0 or more.
        eta: weight of the entropy; the sum with beta above 0.

    Returns:
        Log-probabilities of the optimum (nats).
    """
    return targets.reverse_kl(ref_logp * (beta / (beta + eta)), reward, beta + eta)
