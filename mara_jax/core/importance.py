"""Weights of strings that the policy itself did not draw: ratios of policy to sampler, clipped or truncated.

A rollout that serves several updates is drawn by the policy before the first of them, pi_old. With A a signal that
uses the policy's present log-probabilities (k1 included), E over pi_old of w A grad log pi, w = pi/pi_old of whole
strings, is the on-policy gradient at any distance, provided that a baseline does not look at its own sample. The other
forms here are surrogates: equal to it where pi = pi_old, biased beyond.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Form = Literal["none", "sequence", "length_normalised", "token"]


class Stale(NamedTuple):
    """What stands between the policy and its samples; s is 1 where a whole string has one number, else t.

    `log_ratio` of policy to pi_old (nats); `weight` of pi_old to the sampler, 1 where they agree; `clip`: ratios count
    as far as 1 - clip and 1 + clip only, as in PPO, and without end at 0.
    """

    log_ratio: Float[Array, "p g s"]
    weight: Float[Array, "p g #s"]
    clip: float = 0.0


def log_ratio(
    logp_pgt: Float[Array, "p g t"], old_logp_pgt: Float[Array, "p g t"], mask_pgt: Float[Array, "p g t"], form: Form
) -> Float[Array, "p g s"]:
    """Log of the ratio by which a form weights strings or tokens; not differentiated.

    Args:
        logp_pgt: log-probability of each token under the policy (nats).
        old_logp_pgt: the same under the policy that drew it.
        mask_pgt: 1 where a token counts; what else holds does not matter.
        form: "sequence", pi/pi_old of the string; "length_normalised", its geometric mean over the string's tokens
            (GSPO, arXiv 2507.18071); "token", of each token (PPO, GRPO); "none", 1.

    Returns:
        [p, g, t] for "token", with 0 where masked, else [p, g, 1] (nats).
    """
    moved_pgt = jnp.where(mask_pgt > 0, jax.lax.stop_gradient(logp_pgt - old_logp_pgt), 0.0)
    if form == "token":
        return moved_pgt
    moved_pg1 = jnp.sum(moved_pgt, axis=-1, keepdims=True)
    if form == "length_normalised":
        return moved_pg1 / jnp.maximum(jnp.sum(mask_pgt, axis=-1, keepdims=True), 1)
    return moved_pg1 if form == "sequence" else jnp.zeros_like(moved_pg1)


def truncated(log_weight_pgs: Float[Array, "p g s"], cap: float) -> Float[Array, "p g s"]:
    """min(weight, cap): importance weights whose variance is bounded, at the price of a bias where the cap acts.

    Args:
        log_weight_pgs: log of trainer over sampler (nats), from `log_ratio`.
        cap: largest weight, at least 1.

    Returns:
        Weights; exactly 1 where the two agree.
    """
    return jnp.exp(jnp.minimum(log_weight_pgs, jnp.log(cap)))


def is_clipped(stale: Stale, advantage_pg: Float[Array, "p g"]) -> Float[Array, "p g s"]:
    """Where min(r A, clip(r) A) no longer depends on r: no gradient flows.

    Args:
        stale: the ratios and their clip.
        advantage_pg: advantage of each string.

    Returns:
        True where the ratio has left its range on the side to which the advantage pushes.
    """
    if not stale.clip:
        return jnp.zeros(stale.log_ratio.shape, bool)
    ratio_pgs, advantage_pg1 = jnp.exp(stale.log_ratio), advantage_pg[..., None]
    above = (ratio_pgs > 1 + stale.clip) & (advantage_pg1 > 0)
    return above | ((ratio_pgs < 1 - stale.clip) & (advantage_pg1 < 0))


def coefficient(stale: Stale, advantage_pg: Float[Array, "p g"]) -> Float[Array, "p g s"]:
    """By what each string's or token's advantage x grad log pi is multiplied.

    Args:
        stale: ratios, weights and clip.
        advantage_pg: advantage of each string.

    Returns:
        Ratio x weight, 0 where clipped; [p, g, 1] where both belong to strings, else [p, g, t].
    """
    ratio_pgs = jnp.where(is_clipped(stale, advantage_pg), 0.0, jnp.exp(stale.log_ratio))
    return ratio_pgs * stale.weight


def mean(x_pgs: Float[Array, "p g s"], mask_pgt: Float[Array, "p g t"]) -> Float[Array, ""]:
    """Mean over the strings, or over the tokens that count.

    Args:
        x_pgs: one number a string or token.
        mask_pgt: 1 where a token counts.

    Returns:
        A scalar.
    """
    counts_pgs = mask_pgt > 0 if x_pgs.shape == mask_pgt.shape else jnp.ones(x_pgs.shape, bool)
    return jnp.sum(jnp.where(counts_pgs, x_pgs, 0)) / jnp.sum(counts_pgs)


def effective_samples(log_weight_pg: Float[Array, "p g"]) -> Float[Array, ""]:
    """(sum w)^2 / sum w^2 of each row, averaged over rows; from logarithms, as weights may overflow.

    Args:
        log_weight_pg: log of each sample's weight, up to a constant a row.

    Returns:
        Between 1 and g samples.
    """
    twice = 2 * jax.nn.logsumexp(log_weight_pg, axis=-1)
    return jnp.mean(jnp.exp(twice - jax.nn.logsumexp(2 * log_weight_pg, axis=-1)))


def summary(
    name: str,
    weight_pgs: Float[Array, "p g s"],
    log_whole_pg1: Float[Array, "p g 1"],
    mask_pgt: Float[Array, "p g t"],
) -> dict[str, Float[Array, ""]]:
    """How far weights are from 1.

    Args:
        name: what stands before each metric's name.
        weight_pgs: weights of strings or of tokens; 1 where masked.
        log_whole_pg1: log of the weight of each whole string (nats).
        mask_pgt: 1 where a token counts.

    Returns:
        NAME/mean and NAME/max of the weights; NAME/effective_samples, how many of a group's strings those of weight 1
        would be, by the weights of whole strings.
    """
    return {
        f"{name}/mean": mean(weight_pgs, mask_pgt),
        f"{name}/max": jnp.max(weight_pgs),
        f"{name}/effective_samples": effective_samples(log_whole_pg1[..., 0]),
    }


def string_weight(stale: Stale) -> Float[Array, "p g"]:
    """One weight a string, for terms that are not part of an advantage.

    Args:
        stale: ratios and weights of whole strings, not clipped.

    Returns:
        Ratio x weight.

    Raises:
        ValueError: ratios of tokens, or clipped ones, which no such term knows.
    """
    if stale.clip or stale.log_ratio.shape[-1] != 1 or stale.weight.shape[-1] != 1:
        raise ValueError(
            "a KL that is a term of the loss is weighted by whole, unclipped ratios only: use "
            "algorithm.importance=sequence with algorithm.clip=0, or the estimator k1_in_reward"
        )
    return jnp.exp(stale.log_ratio[..., 0]) * stale.weight[..., 0]
