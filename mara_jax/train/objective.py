"""The objective of a run: from log-probabilities and scores, whatever made them, to the scalar to minimise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mara_jax import config
from mara_jax.core import advantages, augment, importance, kl, objectives


class Scored(NamedTuple):
    """Strings of p prompts, g each, as the objective sees them: no trace of the model that drew them.

    logp [p, g, t] (nats, differentiable), mask [p, g, t] (1 counts), ref_logp [p, g] (nats, whole strings),
    reward [p, g], answer [p, g] (class index, -1 for none), log_mass [p, a] (log Z or log M of each answer).
    unseen_log_mass [p]: that of an answer that is -inf there; None for half of the smallest.
    What training leaves out: ref_token_logp [p, g, t], the reference's nats token by token, for estimators at
    level "token"; anchor_reward and anchor_ref_logp [p], for MARA's anchor over more than the group.
    Where the policy may not be the one that drew the strings: old_logp [p, g, t] of the policy before the rollout's
    first update (None: it is this one), and sampler_logp [p, g, t], what the sampler itself recorded; nats.
    """

    logp: jax.Array
    mask: jax.Array
    ref_logp: jax.Array
    reward: jax.Array
    answer: jax.Array
    log_mass: jax.Array | None
    ref_token_logp: jax.Array | None = None
    anchor_reward: jax.Array | None = None
    anchor_ref_logp: jax.Array | None = None
    old_logp: jax.Array | None = None
    sampler_logp: jax.Array | None = None
    unseen_log_mass: jax.Array | None = None


def augmented(algorithm: config.Algorithm, scored: Scored, beta, threshold) -> tuple[jax.Array, jax.Array]:
    """The reward-transform stage: (reward, ref_logp), both [p, g], as the objective sees them.

    Nothing in it depends on the policy: a rollout's later updates see the same pair as the first.

    Args:
      algorithm: chooses the method, its anchor and the direction; static.
      beta, threshold: traced, so that they can be swept.
    """
    if algorithm.method == "vanilla":
        return scored.reward, scored.ref_logp
    settings = {"beta": beta, "threshold": threshold, "direction": algorithm.kl, "anchor_reward": scored.anchor_reward}
    if algorithm.anchor == "string":
        return augment.mara(scored.reward, scored.ref_logp, anchor_ref_logp=scored.anchor_ref_logp, **settings)
    assert scored.log_mass is not None, "MARA over answers reads the masses of answers"
    settings["unseen_log_mass"] = scored.unseen_log_mass
    return augment.mara_answers(scored.reward, scored.ref_logp, scored.answer, scored.log_mass, **settings)


def objective(
    algorithm: config.Algorithm, scored: Scored, reference: Scored | None, beta, threshold
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar to minimise, and its metrics, from log-probabilities and scores alone.

    Args:
      algorithm: static; also what training refuses is computed here as it stands, for `audit.gradients`.
      scored: strings of the policy itself, or of an older one.
      reference: strings of the reference; needed by the estimator "reference_samples" alone.
      beta, threshold: traced.

    Raises:
      ValueError: level "token" without the reference's log-probabilities of tokens.
    """
    off_policy = off_policy_weights(algorithm, scored)
    shared = {"beta": beta, "advantage": advantages.BY_NAME[algorithm.baseline], "off_policy": off_policy}
    estimator = config.estimator_of(algorithm)
    if estimator == "reference_samples":
        assert reference is not None, "the estimator reference_samples needs completions of the reference"
        reward_pg, ref_logp_pg, ref_hat_pr = _augmented_together(algorithm, scored, reference, beta, threshold)
        weight_pr = jnp.exp(ref_hat_pr - reference.ref_logp)
        value, metrics = objectives.forward_kl_samples(
            scored.logp, scored.mask, reward_pg, reference.logp, reference.mask, weight_pr, **shared
        )
    else:
        reward_pg, ref_logp_pg = augmented(algorithm, scored, beta, threshold)
        if estimator == "ratio":
            value, metrics = objectives.forward_kl_ratio(scored.logp, scored.mask, ref_logp_pg, reward_pg, **shared)
        elif estimator == "k1_in_reward" and algorithm.level == "sequence":
            value, metrics = objectives.reverse_kl(scored.logp, scored.mask, ref_logp_pg, reward_pg, **shared)
        else:
            value, metrics = _placed(algorithm, scored, ref_logp_pg, reward_pg, **shared)
    logp_pg = jax.lax.stop_gradient(jnp.sum(scored.logp * scored.mask, axis=-1))
    changed_pg = (reward_pg != scored.reward) | (ref_logp_pg != scored.ref_logp)
    return value, {f"objective/{name}": scalar for name, scalar in metrics.items()} | {
        "loss": value,
        "reward/mean": jnp.mean(scored.reward),
        "reward/augmented_mean": jnp.mean(reward_pg),
        "mara/augmented_fraction": jnp.mean(changed_pg.astype(jnp.float32)),
        "kl/k1": jnp.mean(logp_pg - scored.ref_logp),
        "logp/mean": jnp.mean(logp_pg),
        **(_weight_metrics(algorithm, scored, off_policy) if off_policy else {}),
    }


def off_policy_weights(algorithm: config.Algorithm, scored: Scored) -> importance.OffPolicy | None:
    """Importance weights of the samples; None where the configuration uses no weights.

    Raises:
      ValueError: weights of the trainer over the sampler without the sampler's log-probabilities.
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
    """Log of trainer over sampler before the first update, of strings or tokens."""
    if scored.sampler_logp is None:
        raise ValueError("algorithm.truncate needs the log-probs that the sampler recorded: use algorithm.truncate=0")
    return importance.log_ratio(old_pgt, scored.sampler_logp, scored.mask, level)


def _weight_metrics(
    algorithm: config.Algorithm, scored: Scored, off_policy: importance.OffPolicy
) -> dict[str, jax.Array]:
    """Means and maxima of what counts; effective samples of a group, by the ratios of whole strings."""
    old_pgt, metrics = _old_logp(scored), {}
    if algorithm.importance != "none":
        whole = importance.log_ratio(scored.logp, old_pgt, scored.mask, "sequence")
        metrics |= importance.summary("ratio", jnp.exp(off_policy.log_ratio), whole, scored.mask)
    if algorithm.truncate:
        whole = _log_mismatch(scored, old_pgt, "sequence")
        metrics |= importance.summary("sampler_weight", off_policy.weight, whole, scored.mask)
        over = _log_mismatch(scored, old_pgt, algorithm.truncate_level) > jnp.log(algorithm.truncate)
        metrics["sampler_weight/truncated_fraction"] = importance.mean(over, scored.mask)
    return metrics


def _placed(algorithm: config.Algorithm, scored: Scored, ref_logp_pg, reward_pg, **shared):
    """A KL estimator at the place and level that the configuration names."""
    pair = config.ESTIMATORS[config.estimator_of(algorithm)]
    assert pair is not None, f"{algorithm.estimator} is no estimator at a place"
    ref_logp_pgt = ref_logp_pg[..., None]
    if algorithm.level == "token":
        if scored.ref_token_logp is None:
            raise ValueError("algorithm.level='token' needs the reference's log-probs of tokens: use level=sequence")
        # An augmentation that moved the reference (Algorithm 2) moved whole strings: there is no share of a token.
        ref_logp_pgt = scored.ref_token_logp
    return objectives.placed(
        scored.logp, scored.mask, ref_logp_pgt, reward_pg,
        estimator=pair[0], placement=pair[1], level=algorithm.level, **shared,
    )  # fmt: skip


def _augmented_together(algorithm: config.Algorithm, scored: Scored, reference: Scored, beta, threshold):
    """Augments both groups of a prompt as one, so that reward and likelihood term share their anchor."""
    combined = scored._replace(
        **{
            name: jnp.concatenate([getattr(scored, name), getattr(reference, name)], axis=1)
            for name in ("reward", "answer", "ref_logp")
        }
    )
    reward_pn, ref_logp_pn = augmented(algorithm, combined, beta, threshold)
    g = scored.reward.shape[1]
    return reward_pn[:, :g], ref_logp_pn[:, :g], ref_logp_pn[:, g:]
