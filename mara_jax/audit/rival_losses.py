"""Losses seen as functions of one group of outcomes: a string is one token, its answer the outcome itself.

Each function returns (live log-probs [a], indices [g], reference [a], reward [a]) -> loss, as
`audit.rivals_table.gradient_of` takes it. Methods of `core.methods` pass the rows that training uses; the others are
what no row has.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mara_jax import config
from mara_jax.core import advantages, method_rules, objectives
from mara_jax.core.scored import Numbers, Scored

Loss = Callable[..., jax.Array]


def _tokens(x_g):
    return x_g[None, :, None]


def _ones(index_g):
    return jnp.ones((1, len(index_g), 1))


def _scored(logp_a, index_g, ref_logp_a, reward_a) -> Scored:
    ref_1g = ref_logp_a[index_g][None]
    scored = Scored(_tokens(logp_a[index_g]), _ones(index_g), ref_1g, reward_a[index_g][None], index_g[None])
    return scored._replace(ref_token_logp=ref_1g[..., None])


def method_loss(algorithm: config.Algorithm, numbers: Numbers, log_z: float | Callable | None = None) -> Loss:
    """The loss of a transform and an objective of `core.methods`.

    Args:
        algorithm: which; "auto" is resolved. Of samples of the reference every outcome counts once, weighted so that
            the mean over outcomes is the sum over the reference.
        numbers: beta, threshold and eta.
        log_z: of the prompt, for objectives that learn it: a constant (nats), or a function of (reference, reward).

    Returns:
        The loss of one group.
    """
    algorithm = method_rules.resolved(algorithm)
    transform, objective = method_rules.rows(algorithm)

    def loss(logp_a, index_g, ref_logp_a, reward_a):
        scored, reference = _scored(logp_a, index_g, ref_logp_a, reward_a), None
        reward_1g, ref_1g = transform.apply(algorithm, scored, numbers)
        scored = scored._replace(reward=reward_1g, ref_logp=ref_1g)
        if log_z is not None:
            value = log_z(ref_logp_a, reward_a) if callable(log_z) else log_z
            scored = scored._replace(prompt_log_z=jnp.reshape(value, 1))
        if method_rules.reads_reference_samples(algorithm):
            every_a = jnp.arange(reward_a.shape[0])
            weight_1a = jnp.exp(ref_logp_a)[None] * len(every_a)
            reference = _scored(logp_a, every_a, ref_logp_a, reward_a)._replace(ref_weight=weight_1a)
        return objective.loss(algorithm, scored, reference, numbers)[0]

    return loss


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


def placed_loss(estimator: str, placement: str, level: str, beta: float, advantage=advantages.none) -> Loss:
    """`objectives.placed` of one group, for placements that no configuration has, too.

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


def likelihood_loss(objective: Callable, **settings) -> Loss:
    """A loss of (logp, mask, reward) without a reference, as `rivals.best_of_n`.

    Args:
        objective: such a loss.
        settings: its keywords.

    Returns:
        The loss of one group.
    """

    def loss(logp_a, index_g, ref_logp_a, reward_a):
        return objective(_tokens(logp_a[index_g]), _ones(index_g), reward_a[index_g][None], **settings)[0]

    return loss
