"""Importance weights of off-policy completions: importance ratios, clipping, and truncated weights.

A rollout that serves several updates is sampled by the policy before the first of them, pi_old. Let A be a signal
that uses the current policy's log-probabilities (k1 included), and w = pi/pi_old the ratio of whole completions. Then
the expectation under pi_old of w A grad log pi equals the on-policy gradient however far pi is from pi_old, provided
that the baseline of a sample does not depend on that sample. The other forms here are surrogates: they equal the
on-policy gradient where pi = pi_old and are biased elsewhere. No ratio exceeds exp(30), see `core.bounded`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mara_jax.core import bounded

Form = Literal["none", "sequence", "length_normalised", "token"]


class OffPolicy(NamedTuple):
    """Importance weights of off-policy samples; s is 1 where a whole completion has one weight, else t.

    `log_ratio`: log of the ratio of the policy to pi_old (nats); `weight`: ratio of pi_old to the sampler's
    probabilities, 1 where they agree; `clip`: ratios are clipped to [1 - clip, 1 + clip] as in PPO; 0 for no clipping.
    """

    log_ratio: Float[Array, "p g s"]
    weight: Float[Array, "p g #s"]
    clip: float = 0.0


def log_ratio(
    logp_pgt: Float[Array, "p g t"], old_logp_pgt: Float[Array, "p g t"], mask_pgt: Float[Array, "p g t"], form: Form
) -> Float[Array, "p g s"]:
    """Log of the importance ratio of each completion or token; not differentiated.

    Args:
        logp_pgt: log-probability of each token under the policy (nats).
        old_logp_pgt: the same under the policy that sampled it.
        mask_pgt: 1 where a token counts; values at masked positions are ignored.
        form: "sequence", pi/pi_old of the completion; "length_normalised", its geometric mean over the completion's
            tokens (GSPO, arXiv 2507.18071); "token", of each token (PPO, GRPO); "none", 1.

    Returns:
        [p, g, t] for "token", with 0 where masked, else [p, g, 1] (nats).
    """
    log_ratio_pgt = jnp.where(mask_pgt > 0, jax.lax.stop_gradient(logp_pgt - old_logp_pgt), 0.0)
    if form == "token":
        return log_ratio_pgt
    log_ratio_pg1 = jnp.sum(log_ratio_pgt, axis=-1, keepdims=True)
    if form == "length_normalised":
        return log_ratio_pg1 / jnp.maximum(jnp.sum(mask_pgt, axis=-1, keepdims=True), 1)
    return log_ratio_pg1 if form == "sequence" else jnp.zeros_like(log_ratio_pg1)


def truncated(log_weight_pgs: Float[Array, "p g s"], cap: float) -> Float[Array, "p g s"]:
    """min(weight, cap): importance weights with bounded variance, and biased where the cap is reached.

    Args:
        log_weight_pgs: log of the ratio of the trainer's to the sampler's probabilities (nats), from `log_ratio`.
        cap: largest weight, at least 1.

    Returns:
        Weights; exactly 1 where the two agree.
    """
    return bounded.exp(jnp.minimum(log_weight_pgs, jnp.log(cap)))


def is_clipped(off_policy: OffPolicy, advantage_pg: Float[Array, "p g"]) -> Float[Array, "p g s"]:
    """Whether min(r A, clip(r) A) does not depend on the ratio r, so that its gradient is zero.

    Args:
        off_policy: the ratios and their clip.
        advantage_pg: advantage of each completion.

    Returns:
        True where the ratio has left its range on the side to which the advantage pushes.
    """
    if not off_policy.clip:
        return jnp.zeros(off_policy.log_ratio.shape, bool)
    ratio_pgs, advantage_pg1 = bounded.exp(off_policy.log_ratio), advantage_pg[..., None]
    above = (ratio_pgs > 1 + off_policy.clip) & (advantage_pg1 > 0)
    return above | ((ratio_pgs < 1 - off_policy.clip) & (advantage_pg1 < 0))


def coefficient(off_policy: OffPolicy, advantage_pg: Float[Array, "p g"]) -> Float[Array, "p g s"]:
    """The factor of advantage x grad log pi of each completion or token.

    Args:
        off_policy: ratios, weights and clip.
        advantage_pg: advantage of each completion.

    Returns:
        Ratio x weight, 0 where clipped; [p, g, 1] where both belong to completions, else [p, g, t].
    """
    ratio_pgs = jnp.where(is_clipped(off_policy, advantage_pg), 0.0, bounded.exp(off_policy.log_ratio))
    return ratio_pgs * off_policy.weight


def mean(value_pgs: Float[Array, "p g s"], mask_pgt: Float[Array, "p g t"]) -> Float[Array, ""]:
    """Mean over the completions, or over the tokens that count.

    Args:
        value_pgs: one number a completion or token.
        mask_pgt: 1 where a token counts.

    Returns:
        A scalar.
    """
    counts_pgs = mask_pgt > 0 if value_pgs.shape == mask_pgt.shape else jnp.ones(value_pgs.shape, bool)
    return jnp.sum(jnp.where(counts_pgs, value_pgs, 0)) / jnp.sum(counts_pgs)


def effective_samples(log_weight_pg: Float[Array, "p g"]) -> Float[Array, ""]:
    """Effective sample size (sum w)^2 / sum w^2 of each row, averaged over rows; computed from logarithms.

    Args:
        log_weight_pg: log of each sample's weight, up to a constant a row; the weights themselves may overflow.

    Returns:
        Between 1 and g samples; 0 for a row whose weights are all 0.
    """
    log_squared_sum_p = 2 * jax.nn.logsumexp(log_weight_pg, axis=-1)
    effective_p = jnp.exp(log_squared_sum_p - jax.nn.logsumexp(2 * log_weight_pg, axis=-1))
    return jnp.mean(jnp.where(log_squared_sum_p == -jnp.inf, 0.0, effective_p))


def summary(
    name: str,
    weight_pgs: Float[Array, "p g s"],
    log_completion_weight_pg1: Float[Array, "p g 1"],
    mask_pgt: Float[Array, "p g t"],
) -> dict[str, Float[Array, ""]]:
    """Metrics of importance weights.

    Args:
        name: prefix of the metrics' names.
        weight_pgs: weights of completions or of tokens; 1 where masked.
        log_completion_weight_pg1: log of the weight of each whole completion (nats).
        mask_pgt: 1 where a token counts.

    Returns:
        NAME/mean and NAME/max of the weights; NAME/effective_samples, the effective sample size of a group by the
        weights of whole completions.
    """
    return {
        f"{name}/mean": mean(weight_pgs, mask_pgt),
        f"{name}/max": jnp.max(weight_pgs),
        f"{name}/effective_samples": effective_samples(log_completion_weight_pg1[..., 0]),
    }


def completion_weight(off_policy: OffPolicy) -> Float[Array, "p g"]:
    """One weight a completion, for loss terms that are not multiplied by an advantage.

    Args:
        off_policy: ratios and weights of whole completions, not clipped.

    Returns:
        Ratio x weight.

    Raises:
        ValueError: ratios of tokens or clipped ratios, which are not defined for such a term.
    """
    if off_policy.clip or off_policy.log_ratio.shape[-1] != 1 or off_policy.weight.shape[-1] != 1:
        raise ValueError(
            "a KL that is a term of the loss is weighted by whole, unclipped ratios only: use "
            "algorithm.importance=sequence with algorithm.clip=0, or the estimator k1_in_reward"
        )
    return bounded.exp(off_policy.log_ratio[..., 0]) * off_policy.weight[..., 0]
