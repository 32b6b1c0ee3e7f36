"""(logp, ref_logp, reward, mask) -> (loss, metrics): minimising the loss follows the objective's gradient.

Samples come from the policy itself at temperature 1, without top-k or top-p, or, with `off_policy`, from an older
policy. Only `logp` carries a gradient. Rewards and reference log-probabilities are those that `core.augment` returns,
one value a completion (anything else raises a ValueError). A loss is the mean over completions and is not divided by
their lengths, so that the KL is that of whole completions.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mara_jax.core import bounded, importance, kl
from mara_jax.core.advantages import Advantage
from mara_jax.core.targets import Scalar

Metrics = dict[str, Float[Array, ""]]
LossAndMetrics = tuple[Float[Array, ""], Metrics]


def sequence_logp(logp_pgt: Float[Array, "p g t"], mask_pgt: Float[Array, "p g t"]) -> Float[Array, "p g"]:
    """Log-probability of each whole completion.

    Args:
        logp_pgt: log-probability of each token (nats); values at masked positions are ignored, NaN
            included.
        mask_pgt: 1 where a token counts, its end token included, else 0.

    Returns:
        The sum over counted tokens (nats).
    """
    return jnp.sum(jnp.where(mask_pgt > 0, logp_pgt, 0.0), axis=-1)


def check_shapes(logp_pg: Float[Array, "p g"], **per_completion: Float[Array, "p g"]) -> None:
    """Refuses arrays that do not hold one value a completion: broadcasting would mix prompts silently.

    Args:
        logp_pg: one value a completion.
        per_completion: arrays that must have its shape, by the name that the error gives them.

    Raises:
        ValueError: naming the array and both shapes.
    """
    for name, array in per_completion.items():
        if jnp.shape(array) != logp_pg.shape:
            raise ValueError(f"{name} of shape {jnp.shape(array)} does not fit completions of shape {logp_pg.shape}")


def _policy_gradient(logp_pgt, mask_pgt, signal_pg, advantage: Advantage, off_policy: importance.OffPolicy | None):
    """-mean of advantage x log-probability, whose gradient estimates that of -E[signal], and metrics.

    The baseline is subtracted from the unweighted signal, and the importance weights multiply the result. With weights
    inside the baseline, either the baseline of a sample would depend on that sample, or the baseline's own gradient
    would not vanish in expectation under the older policy.
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    advantage_pg = jax.lax.stop_gradient(advantage(signal_pg))
    if off_policy is None:
        return -jnp.mean(advantage_pg * logp_pg), {}
    factor_pgs = jax.lax.stop_gradient(importance.coefficient(off_policy, advantage_pg)) * advantage_pg[..., None]
    logp_pgs = logp_pg[..., None] if factor_pgs.shape[-1] == 1 else jnp.where(mask_pgt > 0, logp_pgt, 0.0)
    value = -jnp.mean(jnp.sum(factor_pgs * logp_pgs, axis=-1))
    if not off_policy.clip:
        return value, {}
    return value, {"clipped_fraction": importance.mean(importance.is_clipped(off_policy, advantage_pg), mask_pgt)}


def reverse_kl(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pg: Float[Array, "p g"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
    advantage: Advantage,
    off_policy: importance.OffPolicy | None = None,
) -> LossAndMetrics:
    """E[R] - beta KL(pi || ref) of whole completions: k1 in the reward, detached (Eq. 2; Algorithm 1, line 13).

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pg: log-probability of each completion under the reference (nats).
        reward_pg: reward of each completion, augmented or not.
        beta: regularisation strength; the same as in the augmentation.
        advantage: baseline, one of `core.advantages`, over reward and penalty together.
        off_policy: importance weights of samples of an older policy; None if on-policy. k1 is always that of the
            current policy.

    Returns:
        The loss, and metrics: "loss"; "kl/k1", the mean log-ratio (nats a completion); "return/mean", the mean of
        reward - beta k1.
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, ref_logp=ref_logp_pg, reward=reward_pg)
    k1_pg = kl.k1(jax.lax.stop_gradient(logp_pg), ref_logp_pg)
    return_pg = reward_pg - beta * k1_pg
    loss, metrics = _policy_gradient(logp_pgt, mask_pgt, return_pg, advantage, off_policy)
    return loss, {"loss": loss, "kl/k1": jnp.mean(k1_pg), "return/mean": jnp.mean(return_pg)} | metrics


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
    off_policy: importance.OffPolicy | None = None,
) -> LossAndMetrics:
    """E[R] - beta KL(ref || pi): policy gradient plus maximum likelihood on samples of the reference (Eq. 5).

    A baseline that rescales rewards does not rescale the KL term here: with `advantages.mean` over g samples the
    objective is that of beta g / (g - 1), with `group_normalised` of no fixed beta.

    Args:
        logp_pgt: log-probability of each token sampled from the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        reward_pg: reward of each completion, augmented or not.
        ref_sample_logp_prt: log-probability under the policy of each token of the reference's samples (nats),
            differentiable.
        ref_sample_mask_prt: 1 where such a token counts.
        ref_weight_pr: augmented reference over reference, exp(ref_hat - ref), of each of those samples; 1
            without augmentation.
        beta: regularisation strength.
        advantage: baseline over rewards.
        off_policy: importance weights where the policy's samples are those of an older policy; None if on-policy.

    Returns:
        The loss, and metrics: "loss"; "reference/nll", the weighted mean negative log-likelihood of the
        reference's samples (nats a completion); "weights/effective_samples", out of r; "weights/largest_log" (nats).
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    ref_sample_logp_pr = sequence_logp(ref_sample_logp_prt, ref_sample_mask_prt)
    check_shapes(logp_pg, reward=reward_pg)
    check_shapes(ref_sample_logp_pr, weight=ref_weight_pr)
    weight_pr = jax.lax.stop_gradient(ref_weight_pr)
    nll = -jnp.mean(weight_pr * ref_sample_logp_pr)
    reward_loss, metrics = _policy_gradient(logp_pgt, mask_pgt, reward_pg, advantage, off_policy)
    loss = reward_loss + beta * nll
    log_weight_pr = jnp.log(weight_pr)
    return loss, metrics | {
        "loss": loss,
        "reference/nll": nll,
        "weights/effective_samples": importance.effective_samples(log_weight_pr),
        "weights/largest_log": jnp.max(log_weight_pr),
    }


def forward_kl_ratio(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pg: Float[Array, "p g"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
    advantage: Advantage,
    off_policy: importance.OffPolicy | None = None,
) -> LossAndMetrics:
    """E[R] - beta KL(ref || pi) from samples of the policy alone, weighted by ref / pi (Eq. 5).

    The weight is added to the reward, under the same baseline, which keeps the balance of the two and subtracts the
    weight's own mean. Over long completions weights explode, up to the bound of `core.bounded`: watch their effective
    sample size.

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pg: log-probability of each completion under the (augmented) reference (nats).
        reward_pg: reward of each completion, augmented or not.
        beta: regularisation strength.
        advantage: baseline over reward and weight together.
        off_policy: importance weights of samples of an older policy; None if on-policy.

    Returns:
        The loss, and metrics: "loss"; "weights/effective_samples", out of g; "weights/largest_log" (nats).
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, ref_logp=ref_logp_pg, reward=reward_pg)
    log_weight_pg = ref_logp_pg - jax.lax.stop_gradient(logp_pg)
    signal_pg = reward_pg + beta * bounded.exp(log_weight_pg)
    loss, metrics = _policy_gradient(logp_pgt, mask_pgt, signal_pg, advantage, off_policy)
    return loss, metrics | {
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
    off_policy: importance.OffPolicy | None = None,
) -> LossAndMetrics:
    """E[R] with any KL estimator in the reward or in the loss; `kl.effective` says which KL each optimises.

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pgt: log-probability of each token under the reference (nats). Where only whole completions are
            known (after augmentation), pass their log-probabilities as [p, g, 1] with level "sequence".
        reward_pg: reward of each completion.
        beta: regularisation strength.
        advantage: baseline over the reward and what is added to it; it does not rescale a term in the loss.
        estimator: "k1", "k2", "k3" or "k1_ratio".
        placement: "reward" or "loss".
        level: "sequence" or "token".
        off_policy: importance weights of samples of an older policy; None if on-policy.

    Returns:
        The loss, and metrics: "loss"; "kl/estimate", the mean of the estimator over completions.

    Raises:
        ValueError: for a combination that `kl.effective` does not know; for a term of the loss under ratios that are
            clipped or of tokens.
    """
    kl.effective(estimator, placement, level)
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, reward=reward_pg)
    if level == "sequence":
        ref_mask = mask_pgt if ref_logp_pgt.shape == logp_pgt.shape else jnp.ones_like(ref_logp_pgt)
        logp, ref_logp = logp_pg[..., None], sequence_logp(ref_logp_pgt, ref_mask)[..., None]
    else:
        logp, ref_logp = (jnp.where(mask_pgt > 0, value, 0.0) for value in (logp_pgt, ref_logp_pgt))
    detached = jax.lax.stop_gradient(logp)
    if estimator == "k1_ratio":
        term = kl.k1(detached, ref_logp) * bounded.exp(logp - detached)
    else:
        term = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[estimator](logp, ref_logp)
    signal_pg, loss_term_pg = reward_pg, None
    if placement == "loss":
        loss_term_pg = jnp.sum(term, axis=-1)
    elif level == "sequence":
        signal_pg = reward_pg - beta * jax.lax.stop_gradient(term)[..., 0]
    else:
        loss_term_pg = jnp.sum(jax.lax.stop_gradient(term) * logp, axis=-1)
    loss, metrics = _policy_gradient(logp_pgt, mask_pgt, signal_pg, advantage, off_policy)
    if loss_term_pg is not None:
        loss = loss + beta * jnp.mean(
            loss_term_pg if off_policy is None else importance.completion_weight(off_policy) * loss_term_pg
        )
    return loss, {"loss": loss, "kl/estimate": jnp.mean(jnp.sum(term, axis=-1))} | metrics
