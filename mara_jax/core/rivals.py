"""The losses of other methods, from their published formulas: (logp, mask, ...) -> (loss, metrics).

The conventions are those of `core.objectives`: samples come from the policy itself unless a docstring says otherwise,
only `logp` carries a gradient, an array of another shape raises a ValueError. docs/methods.md gives the optimum of each
loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mara_jax.core import advantages, bounded, kl
from mara_jax.core.importance import effective_samples
from mara_jax.core.objectives import LossAndMetrics, check_shapes, sequence_logp
from mara_jax.core.targets import Scalar

CLIP = 0.2  # token ratios count from 1 - CLIP to 1 + CLIP (GRPO and Dr. GRPO as published)
LEAST_NATS = 1e-3  # of -log pi in REINVENT's likelihood penalty
CLIP_HIGHER = 0.28  # above 1, of DAPO, which keeps CLIP below


def _clipped(logp_pgt, mask_pgt, old_logp_pgt, ref_logp_pgt, advantage_pg, beta, above=CLIP):
    """Per token: min(ratio A, clipped ratio A) - beta k3, masked; with the share of tokens that the clip binds."""
    counts = mask_pgt > 0
    logp, old, ref = (jnp.where(counts, value, 0.0) for value in (logp_pgt, old_logp_pgt, ref_logp_pgt))
    ratio = bounded.exp(logp - jax.lax.stop_gradient(old))
    gain = jax.lax.stop_gradient(advantage_pg)[..., None]
    unclipped, clipped = ratio * gain, jnp.clip(ratio, 1 - CLIP, 1 + above) * gain
    k3 = jnp.where(counts, kl.k3(logp, ref), 0.0)
    value = jnp.where(counts, jnp.minimum(unclipped, clipped), 0.0) - beta * k3
    total = jnp.maximum(jnp.sum(counts), 1)
    metrics = {"kl/k3": jnp.sum(k3) / total, "clipped_fraction": jnp.sum(counts & (clipped < unclipped)) / total}
    return value, metrics


def grpo(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    old_logp_pgt: Float[Array, "p g t"],
    ref_logp_pgt: Float[Array, "p g t"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
) -> LossAndMetrics:
    """GRPO: rewards over their group's deviation, token ratios clipped, k3 in the loss, a mean over each length.

    Source: arXiv 2402.03300, Eq. 3 and 4. The deviation has the divisor g - 1, as in the public
    implementations. On one categorical, on the policy itself, the penalty is the *forward* KL(ref || pi); on
    completions it is neither, and dividing by each completion's own length weighs completions by it.

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        old_logp_pgt: the same under the policy that sampled them (on-policy: its own values, detached).
        ref_logp_pgt: the same under the reference.
        reward_pg: reward of each completion.
        beta: weight of the k3 penalty.

    Returns:
        The loss, and metrics: "loss"; "kl/k3" (nats a token); "clipped_fraction" of the tokens.
    """
    check_shapes(sequence_logp(logp_pgt, mask_pgt), reward=reward_pg)
    advantage_pg = advantages.group_normalised(reward_pg)
    value, metrics = _clipped(logp_pgt, mask_pgt, old_logp_pgt, ref_logp_pgt, advantage_pg, beta)
    length_pg = jnp.maximum(jnp.sum(mask_pgt > 0, axis=-1), 1)
    loss = -jnp.mean(jnp.sum(value, axis=-1) / length_pg)
    return loss, {"loss": loss, **metrics}


def dr_grpo(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    old_logp_pgt: Float[Array, "p g t"],
    ref_logp_pgt: Float[Array, "p g t"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar = 0.0,
) -> LossAndMetrics:
    """Dr. GRPO: GRPO without the group's deviation and without the division by each completion's length.

    Source: arXiv 2503.20783, which drops the penalty too (beta 0) and divides every completion by the same constant,
    here 1. The group mean shrinks the reward's part by (g - 1) / g but not the penalty: on one categorical
    its optimum is that of the forward KL at beta g / (g - 1).

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        old_logp_pgt: the same under the policy that sampled them.
        ref_logp_pgt: the same under the reference.
        reward_pg: reward of each completion.
        beta: weight of the k3 penalty.

    Returns:
        The loss, and metrics: "loss"; "kl/k3" (nats a token); "clipped_fraction" of the tokens.
    """
    check_shapes(sequence_logp(logp_pgt, mask_pgt), reward=reward_pg)
    advantage_pg = advantages.mean(reward_pg)
    value, metrics = _clipped(logp_pgt, mask_pgt, old_logp_pgt, ref_logp_pgt, advantage_pg, beta)
    loss = -jnp.mean(jnp.sum(value, axis=-1))
    return loss, {"loss": loss, **metrics}


def dapo(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    old_logp_pgt: Float[Array, "p g t"],
    reward_pg: Float[Array, "p g"],
) -> LossAndMetrics:
    """DAPO: rewards over their group's deviation, no penalty, one mean over all tokens of the batch.

    Source: arXiv 2503.14476, Eq. 8, ratios clipped from 1 - CLIP to 1 + CLIP_HIGHER. Groups of equal rewards, which it
    samples again, have no gradient here but their tokens count in the mean.

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        old_logp_pgt: the same under the policy that sampled them.
        reward_pg: reward of each completion.

    Returns:
        The loss, and metrics: "loss"; "clipped_fraction" of the tokens.
    """
    check_shapes(sequence_logp(logp_pgt, mask_pgt), reward=reward_pg)
    advantage_pg = advantages.group_normalised(reward_pg)
    value, metrics = _clipped(logp_pgt, mask_pgt, old_logp_pgt, logp_pgt, advantage_pg, 0.0, CLIP_HIGHER)
    loss = -jnp.sum(value) / jnp.maximum(jnp.sum(mask_pgt > 0), 1)
    return loss, {"loss": loss, "clipped_fraction": metrics["clipped_fraction"]}


def maxrl(
    logp_pgt: Float[Array, "p g t"], mask_pgt: Float[Array, "p g t"], reward_pg: Float[Array, "p g"]
) -> LossAndMetrics:
    """MaxRL: policy gradient with rewards over their group's mean, without a penalty.

    Source: arXiv 2602.02710.

    Args:
        logp_pgt: log-probability of each token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        reward_pg: reward of each completion, not negative.

    Returns:
        The loss, and metrics: "loss".
    """
    return _reward_gradient(logp_pgt, mask_pgt, advantages.mean_normalised(reward_pg))


def pass_at_k(
    logp_pgt: Float[Array, "p g t"], mask_pgt: Float[Array, "p g t"], reward_pg: Float[Array, "p g"]
) -> LossAndMetrics:
    """E[max of the group], without a penalty: pass@k with k the group size, where rewards are 0 and 1.

    Source: arXiv 2503.19595. The advantage is not divided by its deviation, as implementations often do.

    Args:
        logp_pgt: log-probability of each token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        reward_pg: reward of each completion; at least two a group.

    Returns:
        The loss, and metrics: "loss"; "unique_best/fraction" of the groups, without which there is no gradient.
    """
    advantage_pg = advantages.best_minus_second(reward_pg)
    # The gradient of a maximum is a sum over the group, not a mean.
    loss, metrics = _reward_gradient(logp_pgt, mask_pgt, advantage_pg * reward_pg.shape[-1])
    return loss, metrics | {"unique_best/fraction": jnp.mean(jnp.any(advantage_pg > 0, axis=-1).astype(loss.dtype))}


def _reward_gradient(logp_pgt, mask_pgt, advantage_pg):
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, reward=advantage_pg)
    loss = -jnp.mean(jax.lax.stop_gradient(advantage_pg) * logp_pg)
    return loss, {"loss": loss}


def group_std_slope(success: Float[Array, "*batch"], group: int) -> Float[Array, "*batch"]:
    """The factor by which dividing by the group's standard deviation multiplies grad s for a reward of 0 or 1.

    With rewards of 0 and 1 the expected gradient of `advantages.group_normalised` is slope(s) grad s, where s
    is the probability of reward 1: GRPO ascends the integral of this slope instead of s. It is constant for
    groups of 2 (1 / sqrt 2) and 3 (2 / sqrt 3), and tends to 1 / sqrt(s (1 - s)) for large groups.

    Args:
        success: probability of reward 1, between 0 and 1.
        group: samples in a group, at least 2 (static).

    Returns:
        The slope, by summing over the number of successes in a group (the epsilon of the division included).
    """
    success = jnp.asarray(success)[..., None]
    wins = jnp.arange(1, group)
    outcomes = (jnp.arange(group) < wins[:, None]).astype(success.dtype)
    # A group with k wins pulls grad s with the advantage of a win over the probability of a loss.
    gain = advantages.group_normalised(outcomes)[:, 0]
    log_ways = jax.scipy.special.gammaln(group) - jax.scipy.special.gammaln(wins)
    log_ways = log_ways - jax.scipy.special.gammaln(group - wins + 1)
    return jnp.sum(gain * jnp.exp(log_ways) * success ** (wins - 1) * (1 - success) ** (group - wins - 1), axis=-1)


def raft(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    reward_pg: Float[Array, "p g"],
    *,
    threshold: Scalar,
) -> LossAndMetrics:
    """RAFT by threshold: maximum likelihood on the samples that reach it (rejection sampling).

    Source: arXiv 2304.06767. Samples come from the policy of the last round: fitted exactly to samples of the
    reference, the policy is the reference restricted to the good completions.

    Args:
        logp_pgt: log-probability of each token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        reward_pg: reward of each completion.
        threshold: reward from which a completion is kept.

    Returns:
        The loss (each prompt's mean over its kept completions, zero where it keeps none), and metrics: "loss";
        "kept/fraction".
    """
    kept_pg = (reward_pg >= threshold).astype(reward_pg.dtype)
    return _likelihood(logp_pgt, mask_pgt, kept_pg)


def best_of_n(
    logp_pgt: Float[Array, "p g t"], mask_pgt: Float[Array, "p g t"], reward_pg: Float[Array, "p g"]
) -> LossAndMetrics:
    """RAFT by rank: maximum likelihood on the best of each group; equal bests share the weight.

    Args:
        logp_pgt: log-probability of each token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        reward_pg: reward of each completion.

    Returns:
        The loss, and metrics: "loss"; "kept/fraction".
    """
    kept_pg = (reward_pg == jnp.max(reward_pg, axis=-1, keepdims=True)).astype(reward_pg.dtype)
    return _likelihood(logp_pgt, mask_pgt, kept_pg)


def _likelihood(logp_pgt, mask_pgt, kept_pg):
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, reward=kept_pg)
    share_pg = kept_pg / jnp.maximum(jnp.sum(kept_pg, axis=-1, keepdims=True), 1)
    loss = -jnp.mean(jnp.sum(share_pg * logp_pg, axis=-1))
    return loss, {"loss": loss, "kept/fraction": jnp.mean(kept_pg)}


def forward_kl_to_target(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pg: Float[Array, "p g"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
    sample_logp_pg: Float[Array, "p g"] | None = None,
) -> LossAndMetrics:
    """KL(G || pi) toward the reverse-KL optimum G: likelihood weighted by ref exp(R / beta) / pi (Eq. 7).

    Weights are normalised in each group, which biases the gradient for small groups but not where it vanishes:
    at pi = G all weights are equal.

    Args:
        logp_pgt: log-probability of each sampled token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pg: log-probability of each completion under the reference (nats), augmented or not.
        reward_pg: reward of each completion, augmented or not.
        beta: regularisation strength of G, above 0.
        sample_logp_pg: log-probability of each completion under the distribution that it was sampled from (nats,
            up to a constant a prompt); the policy itself by default.

    Returns:
        The loss, and metrics: "loss"; "weights/effective_samples", out of g.
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, ref_logp=ref_logp_pg, reward=reward_pg)
    sampler_logp_pg = logp_pg if sample_logp_pg is None else sample_logp_pg
    best_p1 = jnp.max(reward_pg, axis=-1, keepdims=True)
    log_weight_pg = jax.lax.stop_gradient(ref_logp_pg + (reward_pg - best_p1) / beta - sampler_logp_pg)
    loss = -jnp.mean(jnp.sum(jax.nn.softmax(log_weight_pg, axis=-1) * logp_pg, axis=-1))
    return loss, {"loss": loss, "weights/effective_samples": effective_samples(log_weight_pg)}


def trajectory_balance(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pg: Float[Array, "p g"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
    log_z: Scalar | Float[Array, " p"],
) -> LossAndMetrics:
    """GFlowNet trajectory balance: the squared gap log Z + log pi - log ref - R / beta.

    Source: arXiv 2201.13259 with the terminal reward ref exp(R / beta). On samples of the policy itself its
    expected gradient is 2 grad KL(pi || G) whatever log Z is; on other samples only the true log Z makes it
    vanish at G.

    Args:
        logp_pgt: log-probability of each token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pg: log-probability of each completion under the reference (nats), augmented or not.
        reward_pg: reward of each completion, augmented or not.
        beta: regularisation strength of G, above 0.
        log_z: log of the sum of ref exp(R / beta), one number or one a prompt (nats); may be learned.

    Returns:
        The loss (nats squared), and metrics: "loss"; "log_z/batch", the batch's own estimate (nats).
    """
    gap_pg = _gap(logp_pgt, mask_pgt, ref_logp_pg, reward_pg, beta)
    log_z_p1 = jnp.broadcast_to(jnp.asarray(log_z), gap_pg.shape[:-1])[..., None]
    loss = jnp.mean(jnp.square(log_z_p1 + gap_pg))
    return loss, {"loss": loss, "log_z/batch": -jnp.mean(gap_pg)}


def vargrad(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pg: Float[Array, "p g"],
    reward_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
) -> LossAndMetrics:
    """VarGrad: the variance within each group of log pi - log ref - R / beta, which needs no log Z.

    Source: arXiv 2010.10436 (log-variance), arXiv 2302.05446 (for GFlowNets). With the divisor g - 1 its
    gradient on the policy's own samples is, sample by sample, 2 / beta times that of `objectives.reverse_kl`
    with the leave-one-out baseline. On any samples that reach every completion it vanishes at G.

    Args:
        logp_pgt: log-probability of each token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pg: log-probability of each completion under the reference (nats), augmented or not.
        reward_pg: reward of each completion, augmented or not; at least two a group.
        beta: regularisation strength of G, above 0.

    Returns:
        The loss (nats squared), and metrics: "loss"; "log_z/batch", the batch's own estimate (nats).

    Raises:
        ValueError: for groups of one sample, which have no variance.
    """
    gap_pg = _gap(logp_pgt, mask_pgt, ref_logp_pg, reward_pg, beta)
    if gap_pg.shape[-1] < 2:
        raise ValueError("vargrad needs groups of at least 2 samples, not 1: enlarge the group")
    loss = jnp.mean(jnp.var(gap_pg, axis=-1, ddof=1))
    return loss, {"loss": loss, "log_z/batch": -jnp.mean(gap_pg)}


def _gap(logp_pgt, mask_pgt, ref_logp_pg, reward_pg, beta):
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, ref_logp=ref_logp_pg, reward=reward_pg)
    return logp_pg - ref_logp_pg - reward_pg / beta


def reinvent(
    logp_pgt: Float[Array, "p g t"],
    mask_pgt: Float[Array, "p g t"],
    ref_logp_pg: Float[Array, "p g"],
    reward_pg: Float[Array, "p g"],
    *,
    sigma: Scalar,
    likelihood_penalty: float = 0.0,
) -> LossAndMetrics:
    """REINVENT: the squared gap of log pi to the augmented log-likelihood log ref + sigma R.

    mol_opt adds c times the mean of -1 / log pi, against collapse: sample by sample the gradient is then that of a
    reward lower by c / (2 sigma log pi^2), so that likely completions lose most.

    Source: arXiv 1704.07555; mol_opt (arXiv 2206.12411) for the penalty. Without it, it is trajectory balance with
    log Z fixed at 0 and beta = 1 / sigma: on the policy's own samples its expected gradient is -2 sigma grad J; on
    others (replay) it does not vanish at G.

    Args:
        logp_pgt: log-probability of each token under the policy (nats), differentiable.
        mask_pgt: 1 where a token counts.
        ref_logp_pg: log-probability of each completion under the prior (nats), augmented or not.
        reward_pg: score of each completion, augmented (with beta = 1 / sigma) or not.
        sigma: weight of the score (nats a reward unit).
        likelihood_penalty: c (nats squared times nats), static; 5000 in mol_opt. Completions of probability 1 count as
            of exp(-LEAST_NATS).

    Returns:
        The loss (nats squared), and metrics: "loss"; "augmented/mean", the mean augmented log-likelihood.
    """
    logp_pg = sequence_logp(logp_pgt, mask_pgt)
    check_shapes(logp_pg, ref_logp=ref_logp_pg, reward=reward_pg)
    augmented_pg = ref_logp_pg + sigma * reward_pg
    loss = jnp.mean(jnp.square(augmented_pg - logp_pg))
    if likelihood_penalty:
        loss = loss - likelihood_penalty * jnp.mean(1 / jnp.minimum(logp_pg, -LEAST_NATS))
    return loss, {"loss": loss, "augmented/mean": jnp.mean(augmented_pg)}
