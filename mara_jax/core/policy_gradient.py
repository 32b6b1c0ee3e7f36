"""E[R] - beta KL of whole completions as a loss: any trainable estimator, any baseline, importance ratios.

Everything that `algorithm` chooses is static; it also computes what training refuses, for `audit.gradients`.
"""

import jax
import jax.numpy as jnp

from mara_jax.core import advantages, bounded, importance, kl, objectives
from mara_jax.core.objectives import LossAndMetrics, Metrics
from mara_jax.core.scored import Algorithm, Numbers, Scored


def loss(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers) -> LossAndMetrics:
    """The loss of our own objective on rewards that a transform has passed.

    Args:
        algorithm: without "auto".
        scored: completions of the policy itself, or of an older one.
        reference: completions of the reference policy, with `ref_weight`; the estimator "reference_samples" needs them.
        numbers: traced.

    Returns:
        The loss, and metrics.

    Raises:
        ValueError: level "token" without the reference policy's log-probs of tokens; weights of the trainer over the
            sampler without the sampler's log-probs.
    """
    off_policy = off_policy_weights(algorithm, scored)
    advantage = advantages.BY_NAME[algorithm.baseline]
    if scored.counted is not None:
        assert algorithm.baseline == "leave_one_out", "completions are left out with the leave-one-out baseline alone"
        advantage = advantages.leave_one_out_of(scored.counted)
    shared = {"beta": numbers.beta, "advantage": advantage, "off_policy": off_policy}
    estimator = algorithm.estimator
    whole = scored.logp, scored.mask, scored.ref_logp, scored.reward
    if estimator == "reference_samples":
        assert reference is not None and reference.ref_weight is not None, "reference_samples needs its completions"
        likelihood = reference.logp, reference.mask, reference.ref_weight
        value, metrics = objectives.forward_kl_samples(scored.logp, scored.mask, scored.reward, *likelihood, **shared)
    elif estimator == "ratio":
        value, metrics = objectives.forward_kl_ratio(*whole, **shared)
    elif estimator == "k1_in_reward" and algorithm.level == "sequence":
        value, metrics = objectives.reverse_kl(*whole, **shared)
    else:
        value, metrics = _placed(algorithm, scored, **shared)
    return value, metrics | (_weight_metrics(algorithm, scored, off_policy) if off_policy else {})


def off_policy_weights(algorithm: Algorithm, scored: Scored) -> importance.OffPolicy | None:
    """Importance weights of the samples.

    Args:
        algorithm: which ratios, and how they are clipped and truncated.
        scored: with the log-probs of the older policy, and of the sampler where weights are truncated.

    Returns:
        The weights; None where the configuration uses none.

    Raises:
        ValueError: weights of the trainer over the sampler without the sampler's log-probs.
    """
    if algorithm.importance == "none" and not algorithm.truncate:
        return None
    old_pgt = _old_logp(scored)
    moved = importance.log_ratio(scored.logp, old_pgt, scored.mask, algorithm.importance)
    weight = jnp.ones_like(moved)
    if algorithm.truncate:
        weight = importance.truncated(_log_mismatch(scored, old_pgt, algorithm.truncate_level), algorithm.truncate)
    return importance.OffPolicy(moved, weight, algorithm.clip)


def _old_logp(scored: Scored) -> jax.Array:
    return jax.lax.stop_gradient(scored.logp if scored.old_logp is None else scored.old_logp)


def _log_mismatch(scored: Scored, old_pgt: jax.Array, level: kl.Level) -> jax.Array:
    """Log of trainer over sampler before the first update, of completions or tokens."""
    if scored.sampler_logp is None:
        raise ValueError("algorithm.truncate needs the log-probs that the sampler recorded: use algorithm.truncate=0")
    return importance.log_ratio(old_pgt, scored.sampler_logp, scored.mask, level)


def _weight_metrics(algorithm: Algorithm, scored: Scored, off_policy: importance.OffPolicy) -> Metrics:
    """Means and maxima of the weights; effective samples of a group, by the ratios of whole completions."""
    old_pgt, metrics = _old_logp(scored), {}
    if algorithm.importance != "none":
        whole = importance.log_ratio(scored.logp, old_pgt, scored.mask, "sequence")
        metrics |= importance.summary("ratio", bounded.exp(off_policy.log_ratio), whole, scored.mask)
    if algorithm.truncate:
        whole = _log_mismatch(scored, old_pgt, "sequence")
        metrics |= importance.summary("sampler_weight", off_policy.weight, whole, scored.mask)
        over = _log_mismatch(scored, old_pgt, algorithm.truncate_level) > jnp.log(algorithm.truncate)
        metrics["sampler_weight/truncated_fraction"] = importance.mean(over, scored.mask)
    return metrics


def _placed(algorithm: Algorithm, scored: Scored, **shared) -> LossAndMetrics:
    """A KL estimator at the place and level that the configuration names."""
    estimator, placement = kl.PLACED[algorithm.estimator]
    ref_logp_pgt = scored.ref_logp[..., None]
    if algorithm.level == "token":
        if scored.ref_token_logp is None:
            raise ValueError("algorithm.level='token' needs the reference's log-probs of tokens: use level=sequence")
        # An augmentation that moved the reference (Algorithm 2) moved whole completions: there is no share of a token.
        ref_logp_pgt = scored.ref_token_logp
    return objectives.placed(
        scored.logp, scored.mask, ref_logp_pgt, scored.reward,
        estimator=estimator, placement=placement, level=algorithm.level, **shared,
    )  # fmt: skip
