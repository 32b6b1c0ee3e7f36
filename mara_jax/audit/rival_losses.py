"""Losses seen as functions of one group of outcomes: a string is one token, its answer the outcome itself.

Each function returns (live log-probs [a], indices [g], reference [a], reward [a]) -> loss, as
`stationary.expected_field` takes it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mara_jax.core import advantages, objectives, rival_rewards

Loss = Callable[..., jax.Array]


def _tokens(x_g):
    return x_g[None, :, None]


def _ones(index_g):
    return jnp.ones((1, len(index_g), 1))


def policy_loss(objective: Callable, **settings) -> Loss:
    """A loss of (logp, mask, ref_logp of strings, reward), seen as a function of one group of outcomes.

    Args:
        objective: such a loss, from `core.objectives` or `core.rivals`.
        settings: its keywords.

    Returns:
        The loss of one group.
    """

    def loss(logp_a, index_g, ref_logp_a, reward_a):
        logp = _tokens(logp_a[index_g])
        return objective(logp, _ones(index_g), ref_logp_a[index_g][None], reward_a[index_g][None], **settings)[0]

    return loss


def transformed_loss(transform: Callable, advantage: advantages.Advantage, beta: float) -> Loss:
    """`objectives.reverse_kl` on a transformed reward.

    Args:
        transform: (reward_pg, logp_pg, answer_pg) -> reward_pg; every outcome is its own answer.
        advantage: baseline over reward and penalty.
        beta: regularisation strength.

    Returns:
        The loss of one group.
    """

    def loss(logp_a, index_g, ref_logp_a, reward_a):
        reward = transform(reward_a[index_g][None], jax.lax.stop_gradient(logp_a[index_g][None]), index_g[None])
        settings = {"beta": beta, "advantage": advantage}
        shared = _tokens(logp_a[index_g]), _ones(index_g), ref_logp_a[index_g][None], reward
        return objectives.reverse_kl(*shared, **settings)[0]

    return loss


def placed_loss(estimator: str, placement: str, level: str, beta: float, advantage=advantages.none) -> Loss:
    """`objectives.placed` of one group.

    Args:
        estimator: one of `kl.Estimator`.
        placement: "reward" or "loss".
        level: "sequence" or "token", the same on one token.
        beta: regularisation strength.
        advantage: baseline over what stands in the reward.

    Returns:
        The loss of one group.
    """

    def loss(logp_a, index_g, ref_logp_a, reward_a):
        return objectives.placed(
            _tokens(logp_a[index_g]), _ones(index_g), _tokens(ref_logp_a[index_g]), reward_a[index_g][None],
            beta=beta, advantage=advantage, estimator=estimator, placement=placement, level=level,  # type: ignore[arg-type]
        )[0]  # fmt: skip

    return loss


def forward_samples_loss(beta: float, advantage: advantages.Advantage, outcomes: int = 5) -> Loss:
    """`objectives.forward_kl_samples` of one group, its reference samples summed exactly.

    Args:
        beta: regularisation strength.
        advantage: baseline over rewards.
        outcomes: number of outcomes.

    Returns:
        The loss of one group.
    """

    def loss(logp_a, index_g, ref_logp_a, reward_a):
        # Every outcome once, weighted so that the mean over outcomes is the sum over the reference.
        weight = jnp.exp(ref_logp_a) * outcomes
        return objectives.forward_kl_samples(
            _tokens(logp_a[index_g]), _ones(index_g), reward_a[index_g][None],
            _tokens(logp_a), jnp.ones((1, outcomes, 1)), weight[None], beta=beta, advantage=advantage,
        )[0]  # fmt: skip

    return loss


def grpo_loss(objective: Callable, beta: float, transform: Callable | None = None) -> Loss:
    """`rivals.grpo` or `rivals.dr_grpo` of one group, on the policy's own samples.

    Args:
        objective: one of the two.
        beta: weight of the k3 penalty.
        transform: a reward transform as in `transformed_loss`.

    Returns:
        The loss of one group.
    """

    def loss(logp_a, index_g, ref_logp_a, reward_a):
        logp, reward = _tokens(logp_a[index_g]), reward_a[index_g][None]
        frozen = jax.lax.stop_gradient(logp)
        if transform is not None:
            reward = transform(reward, frozen[..., 0], index_g[None])
        return objective(logp, _ones(index_g), frozen, _tokens(ref_logp_a[index_g]), reward, beta=beta)[0]

    return loss


def likelihood_loss(objective: Callable, **settings) -> Loss:
    """`rivals.raft` or `rivals.best_of_n` of one group.

    Args:
        objective: one of the two.
        settings: its keywords.

    Returns:
        The loss of one group.
    """

    def loss(logp_a, index_g, ref_logp_a, reward_a):
        return objective(_tokens(logp_a[index_g]), _ones(index_g), reward_a[index_g][None], **settings)[0]

    return loss


def unlikeliness(reward, logp, answer):
    """`rival_rewards.unlikeliness` in the form that `transformed_loss` takes."""
    return rival_rewards.unlikeliness(reward, logp)


def darling(reward, logp, answer):
    """`rival_rewards.darling` in the form that `transformed_loss` takes."""
    return rival_rewards.darling(reward, answer)


def inverse_probability(reward, logp, answer):
    """`rival_rewards.inverse_probability` in the form that `transformed_loss` takes."""
    return rival_rewards.inverse_probability(reward, answer)


def entropy(eta: float) -> Callable:
    """`rival_rewards.entropy_bonus` in the form that `transformed_loss` takes.

    Args:
        eta: weight of the entropy.

    Returns:
        The transform.
    """
    return lambda reward, logp, answer: rival_rewards.entropy_bonus(reward, logp, eta=eta)
