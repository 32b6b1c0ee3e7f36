"""(logp, ref_logp, reward, mask) -> (loss, metrics): minimising the loss follows the objective's gradient.

Samples come from the policy itself, unclipped, at temperature 1, or, with `stale`, from an older one. Only `logp`
carries a gradient. Rewards and reference log-probabilities are those that `core.augment` returns, one value a string
(anything else raises a ValueError); a loss is the mean over strings and is not divided by their lengths, so that the
KL is that of whole strings.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mara_jax.core import importance, kl
from mara_jax.core.advantages import Advantage
from mara_jax.core.targets import Scalar

Metrics = dict[str, Float[Array, ""]]
LossAndMetrics = tuple[Float[Array, ""], Metrics]


def sequence_logp(logp_pgt: Float[Array, "p g t"], mask_pgt: Float[Array, "p g t"]) -> Float[Array, "p g"]:
    """Log-probability of each whole string.

    Args:
        logp_pgt: log-probability of each token (nats); what masked positions hold does not matter, NaN
            included.
        mask_pgt: 1 where a token counts, its end token included, else 0.

    Returns:
        The sum over counted tokens (nats).
    """
    return jnp.sum(jnp.where(mask_pgt > 0, logp_pgt, 0.0), axis=-1)


def check_shapes(logp_pg: Float[Array, "p g"], **per_string: Float[Array, "p g"]) -> None:
    """Refuse arrays that are not one value a string: broadcasting would mix prompts without a word.

    Args:
        logp_pg: one value a string.
        per_string: arrays that must have its shape, by the name that the error gives them.

    Raises:
        ValueError: naming the array and both shapes.
    """
    for name, array in per_string.items():
        if jnp.shape(array) != logp_pg.shape:
            raise ValueError(f"{name} of shape {jnp.shape(array)} does not fit strings of shape {logp_pg.shape}")


def _policy_gradient(logp_pgt, mask_pgt, signal_pg, advantage: Advantage, stale: importance.Stale | None):
    """-mean of advantage x log-probability, whose gradient is that of -E[signal], estimated; and metrics.

    The baseline is taken off the bare signal, weights come last: weights inside it would leave each sample a baseline
    that is no longer independent of it, or one whose own gradient does not vanish under the older policy.
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    advantage_pg = jax.lax.stop_gradient(advantage(signal_pg))
    if stale is None:
        return -jnp.mean(advantage_pg * logp_pg), {}
    factor_pgs = jax.lax.stop_gradient(importance.coefficient(stale, advantage_pg)) * advantage_pg[..., None]
    live_pgs = logp_pg[..., None] if factor_pgs.shape[-1] == 1 else jnp.where(mask_pgt > 0, logp_pgt, 0.0)
    value = -jnp.mean(jnp.sum(factor_pgs * live_pgs, axis=-1))
    if not stale.clip:
        return value, {}
    return value, {"clipped_fraction": importance.mean(importance.is_clipped(stale, advantage_pg), mask_pgt)}


def reverse_kl(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pg: Float[Array, "p g"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
    advantage: Advantage,
    stale: importance.Stale | None = None,
) -> LossAndMetrics:
    """E[R] - beta KL(pi || ref) of whole strings: k1 in the reward, detached (Eq. 2; Algorithm 1, line 13).

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pg: log-probability of each string under the reference (nats).
        reward_pg: reward of each string, augmented or not.
        beta: regularisation strength; the same as in the augmentation.
        advantage: baseline, one of `core.advantages`, over reward and penalty together.
        stale: where the strings were drawn by an older policy: k1 is the present policy's all the same; None: by this.

    Returns:
        The loss, and metrics: "loss"; "kl/k1", the mean log-ratio (nats a string); "return/mean", the mean of
        reward - beta k1.
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, ref_logp=ref_logp_pg, reward=reward_pg)
    k1_pg = kl.k1(jax.lax.stop_gradient(logp_pg), ref_logp_pg)
    return_pg = reward_pg - beta * k1_pg
    loss, more = _policy_gradient(logp_pgt, mask_pgt, return_pg, advantage, stale)
    return loss, {"loss": loss, "kl/k1": jnp.mean(k1_pg), "return/mean": jnp.mean(return_pg)} | more


def forward_kl_samples(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    reward_pg: Float[Array, "p g"],
    ref_sample_logp_prt: Float[Array, "p r t"],
    ref_sample_mask_prt: Float[Array, "p r t"],
    ref_weight_pr: Float[Array, "p r"],
    *,
    beta: Scalar,
    advantage: Advantage,
    stale: importance.Stale | None = None,
) -> LossAndMetrics:
    """E[R] - beta KL(ref || pi): policy gradient plus maximum likelihood on samples of the reference (Eq. 5).

    A baseline that rescales rewards rescales them alone here: with `advantages.mean` over g samples the
    objective is that of beta g / (g - 1), with `group_normalised` of no fixed beta.

    Args:
        logp_pgt: log-probability of each token sampled from the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        reward_pg: reward of each string, augmented or not.
        ref_sample_logp_prt: log-probability under the policy of each token of the reference's strings (nats),
            differentiable.
        ref_sample_mask_prt: 1 where such a token counts.
        ref_weight_pr: augmented reference over reference, exp(ref_hat - ref), of each of those strings; 1
            without augmentation.
        beta: regularisation strength.
        advantage: baseline over rewards.
        stale: where the policy's strings were drawn by an older one; the reference's need no weights.

    Returns:
        The loss, and metrics: "loss"; "reference/nll", the weighted mean negative log-likelihood of the
        reference's strings (nats a string); "weights/effective_samples", out of r.
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    ref_sample_logp_pr = sequence_logp(ref_sample_logp_prt, ref_sample_mask_prt)
    check_shapes(logp_pg, reward=reward_pg)
    check_shapes(ref_sample_logp_pr, weight=ref_weight_pr)
    weight_pr = jax.lax.stop_gradient(ref_weight_pr)
    nll = -jnp.mean(weight_pr * ref_sample_logp_pr)
    earned, more = _policy_gradient(logp_pgt, mask_pgt, reward_pg, advantage, stale)
    loss = earned + beta * nll
    effective = importance.effective_samples(jnp.log(weight_pr))
    return loss, {"loss": loss, "reference/nll": nll, "weights/effective_samples": effective} | more


def forward_kl_ratio(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pg: Float[Array, "p g"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
    advantage: Advantage,
    stale: importance.Stale | None = None,
) -> LossAndMetrics:
    """E[R] - beta KL(ref || pi) from samples of the policy alone, weighted by ref / pi (Eq. 5).

    The weight stands in the reward, under the same baseline, which keeps their balance and takes off the
    weight's own mean. Over long strings weights explode: watch their effective sample size.

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pg: log-probability of each string under the (augmented) reference (nats).
        reward_pg: reward of each string, augmented or not.
        beta: regularisation strength.
        advantage: baseline over reward and weight together.
        stale: where the strings were drawn by an older policy; None: by this one.

    Returns:
        The loss, and metrics: "loss"; "weights/effective_samples", out of g; "weights/largest_log" (nats).
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, ref_logp=ref_logp_pg, reward=reward_pg)
    log_weight_pg = ref_logp_pg - jax.lax.stop_gradient(logp_pg)
    signal_pg = reward_pg + beta * jnp.exp(log_weight_pg)
    loss, more = _policy_gradient(logp_pgt, mask_pgt, signal_pg, advantage, stale)
    return loss, more | {
        "loss": loss,
        "weights/effective_samples": importance.effective_samples(log_weight_pg),
        "weights/largest_log": jnp.max(log_weight_pg),
    }


def placed(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pgt: Float[Array, "p g t"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
    advantage: Advantage,
    estimator: kl.Estimator,
    placement: kl.Placement,
    level: kl.Level,
    stale: importance.Stale | None = None,
) -> LossAndMetrics:
    """A KL estimator at a place of choice, right or wrong: `kl.effective` says what each optimises.

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pgt: log-probability of each token under the reference (nats). Where only whole strings are
            known (after augmentation), pass their log-probabilities as [p, g, 1] with level "sequence".
        reward_pg: reward of each string.
        beta: regularisation strength.
        advantage: baseline over what stands in the reward; a term in the loss is not rescaled by it.
        estimator: "k1", "k2", "k3" or "k1_ratio".
        placement: "reward" or "loss".
        level: "sequence" or "token".
        stale: where the strings were drawn by an older policy; None: by this one.

    Returns:
        The loss, and metrics: "loss"; "kl/estimate", the mean of the estimator over strings.

    Raises:
        ValueError: for a combination that `kl.effective` does not know; for a term of the loss under ratios that are
            clipped or of tokens.
    """
    kl.effective(estimator, placement, level)
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, reward=reward_pg)
    if level == "sequence":
        ref_mask = mask_pgt if ref_logp_pgt.shape == logp_pgt.shape else jnp.ones_like(ref_logp_pgt)
        live, ref = logp_pg[..., None], sequence_logp(ref_logp_pgt, ref_mask)[..., None]
    else:
        live, ref = (jnp.where(mask_pgt > 0, x, 0.0) for x in (logp_pgt, ref_logp_pgt))
    frozen = jax.lax.stop_gradient(live)
    if estimator == "k1_ratio":
        term = kl.k1(frozen, ref) * jnp.exp(live - frozen)
    else:
        term = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[estimator](live, ref)
    signal_pg, own_pg = reward_pg, None
    if placement == "loss":
        own_pg = jnp.sum(term, axis=-1)
    elif level == "sequence":
        signal_pg = reward_pg - beta * jax.lax.stop_gradient(term)[..., 0]
    else:
        own_pg = jnp.sum(jax.lax.stop_gradient(term) * live, axis=-1)
    loss, more = _policy_gradient(logp_pgt, mask_pgt, signal_pg, advantage, stale)
    if own_pg is not None:
        loss = loss + beta * jnp.mean(own_pg if stale is None else importance.string_weight(stale) * own_pg)
    return loss, {"loss": loss, "kl/estimate": jnp.mean(jnp.sum(term, axis=-1))} | more
