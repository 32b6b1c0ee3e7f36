"""The pure update: reward augmentation, objective, gradient, optimiser."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mara_jax import config
from mara_jax.core import advantages, augment, objectives
from mara_jax.policies import transformer
from mara_jax.sampling import head, logprobs
from mara_jax.train.state import Batch, State


class Scored(NamedTuple):
    """Strings of p prompts, g each, as the objective sees them: no trace of the model that drew them.

    logp [p, g, t] (nats, differentiable), mask [p, g, t] (1 counts), ref_logp [p, g] (nats, whole strings),
    reward [p, g], answer [p, g] (class index, -1 for none), log_mass [p, a] (log Z or log M of each answer).
    What training leaves out: ref_token_logp [p, g, t], the reference's nats token by token, for estimators at
    level "token"; anchor_reward and anchor_ref_logp [p], for MARA's anchor over more than the group.
    """

    logp: jax.Array
    mask: jax.Array
    ref_logp: jax.Array
    reward: jax.Array
    answer: jax.Array
    log_mass: jax.Array
    ref_token_logp: jax.Array | None = None
    anchor_reward: jax.Array | None = None
    anchor_ref_logp: jax.Array | None = None


def augmented(algorithm: config.Algorithm, scored: Scored, beta, threshold) -> tuple[jax.Array, jax.Array]:
    """The reward-transform stage: (reward, ref_logp), both [p, g], as the objective sees them.

    Args:
      algorithm: chooses the method, its anchor and the direction; static.
      beta, threshold: traced, so that they can be swept.
    """
    if algorithm.method == "vanilla":
        return scored.reward, scored.ref_logp
    settings = {"beta": beta, "threshold": threshold, "direction": algorithm.kl, "anchor_reward": scored.anchor_reward}
    if algorithm.anchor == "string":
        return augment.mara(scored.reward, scored.ref_logp, anchor_ref_logp=scored.anchor_ref_logp, **settings)
    return augment.mara_answers(scored.reward, scored.ref_logp, scored.answer, scored.log_mass, **settings)


def objective(
    algorithm: config.Algorithm, scored: Scored, reference: Scored | None, beta, threshold
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar to minimise, and its metrics, from log-probabilities and scores alone.

    Args:
      algorithm: static; also what training refuses is computed here as it stands, for `lab.audit`.
      scored: strings of the policy itself.
      reference: strings of the reference; needed by the estimator "reference_samples" alone.
      beta, threshold: traced.

    Raises:
      ValueError: level "token" without the reference's log-probabilities of tokens.
    """
    shared = {"beta": beta, "advantage": advantages.BY_NAME[algorithm.baseline]}
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
    }


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


def loss(
    params: Any,
    ref_params: Any,
    arch: transformer.Architecture,
    algorithm: config.Algorithm,
    batch: Batch,
    reference: Batch | None,
    beta,
    threshold,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar to minimise, and metrics of the batch.

    Args:
      batch: completions of the policy itself.
      reference: completions of the reference; needed by the estimator "reference_samples" alone.
    """
    both = (batch, _used(algorithm, reference))
    stats = jax.tree.map(lambda one: _stats(params, ref_params, arch, one), both, is_leaf=_is_batch)
    return _of_stats(stats, both, algorithm, beta, threshold)


def gradient(
    params: Any,
    ref_params: Any,
    arch: transformer.Architecture,
    algorithm: config.Algorithm,
    batch: Batch,
    reference: Batch | None,
    beta,
    threshold,
    parts: int = 1,
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of `loss` and its metrics, the batch taken through the model in `parts` of its groups' samples.

    Memory falls with the number of parts, the result stays the same: baselines and anchors see whole groups, because
    the objective is differentiated by the log-probabilities of all samples first (made by forward passes alone), and
    each part's share of that is then drawn back through the model. Costs one more forward pass; one part costs none.
    """
    if parts == 1:
        return jax.grad(loss, has_aux=True)(params, ref_params, arch, algorithm, batch, reference, beta, threshold)
    both = (batch, _used(algorithm, reference))
    cut = jax.tree.map(functools.partial(_cut, parts), both, is_leaf=_is_batch)

    def stats_of(params, part):
        return jax.tree.map(lambda one: _stats(params, ref_params, arch, one), part, is_leaf=_is_batch)

    stats = jax.tree.map(logprobs.joined, jax.lax.map(lambda part: stats_of(params, part), cut))

    def of_logp(logp):
        changed = tuple(None if one is None else one._replace(logp=x) for one, x in zip(stats, logp, strict=True))
        return _of_stats(changed, both, algorithm, beta, threshold)

    logp = tuple(None if one is None else one.logp for one in stats)
    by_logp, metrics = jax.grad(of_logp, has_aux=True)(logp)

    def add(total, xs):
        part, by_logp = xs
        logp_of = lambda params: tuple(None if one is None else one.logp for one in stats_of(params, part))  # noqa: E731
        (more,) = jax.vjp(logp_of, params)[1](by_logp)
        return jax.tree.map(jnp.add, total, more), None

    cut_by_logp = jax.tree.map(lambda x: logprobs.split(x, parts), by_logp)
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (cut, cut_by_logp))[0], metrics


def _is_batch(x: Any) -> bool:
    return isinstance(x, Batch)


def _used(algorithm: config.Algorithm, reference: Batch | None) -> Batch | None:
    return reference if config.estimator_of(algorithm) == "reference_samples" else None


def _cut(parts: int, batch: Batch) -> Batch:
    """What `_stats` reads of a batch, part by part on a new leading axis."""
    whole = ("prompt_tokens", "prompt_lengths", "log_mass")
    cut = {name: jnp.broadcast_to(x, (parts, *x.shape)) for name in whole for x in [getattr(batch, name)]}
    cut |= {name: logprobs.split(getattr(batch, name), parts) for name in ("tokens", "lengths", "reward", "answer")}
    return dataclasses.replace(batch, **cut)  # the packing and the reference's hidden states have that axis already


def _of_stats(stats: tuple, both: tuple, algorithm: config.Algorithm, beta, threshold):
    """`objective` of the statistics of the batch, and where there are any of the reference's samples, and metrics."""
    scored, drawn = (None if one is None else _scored(one, batch) for one, batch in zip(stats, both, strict=True))
    assert scored is not None
    value, metrics = objective(algorithm, scored, drawn, beta, threshold)
    return value, metrics | {
        "kl/reverse": jnp.mean(jnp.sum(stats[0].kl * scored.mask, axis=-1)),
        "length/mean": jnp.mean(both[0].lengths.astype(jnp.float32)),
    }


def _augmented_together(algorithm: config.Algorithm, scored: Scored, reference: Scored, beta, threshold):
    """Augments both groups of a prompt as one, so that reward and likelihood term share their anchor."""
    both = scored._replace(
        **{
            name: jnp.concatenate([getattr(scored, name), getattr(reference, name)], axis=1)
            for name in ("reward", "answer", "ref_logp")
        }
    )
    reward_pn, ref_logp_pn = augmented(algorithm, both, beta, threshold)
    g = scored.reward.shape[1]
    return reward_pn[:, :g], ref_logp_pn[:, :g], ref_logp_pn[:, g:]


def _stats(params, ref_params, arch, batch: Batch) -> head.Stats:
    """What policy and reference say of each token, [p, g, t]."""
    hidden = logprobs.completion_hidden(
        arch, params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens, batch.packing
    )
    return logprobs.token_stats(
        arch, params, hidden, batch.tokens, batch.packing, ref_params=ref_params, ref_hidden=batch.ref_hidden
    )


def _scored(stats: head.Stats, batch: Batch) -> Scored:
    mask_pgt = logprobs.mask(batch.lengths, batch.tokens.shape[-1])
    assert stats.ref_logp is not None
    ref_logp_pg = jnp.sum(stats.ref_logp * mask_pgt, axis=-1)
    return Scored(stats.logp, mask_pgt, ref_logp_pg, batch.reward, batch.answer, batch.log_mass)


@functools.partial(jax.jit, static_argnames=("arch", "algorithm", "tx", "parts"), donate_argnames=("state",))
def update(
    state: State,
    ref_params: Any,
    batch: Batch,
    reference: Batch | None,
    beta: jax.Array,
    threshold: jax.Array,
    *,
    arch: transformer.Architecture,
    algorithm: config.Algorithm,
    tx: optax.GradientTransformation,
    parts: int = 1,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimiser step on one batch; the old state's buffers are given up, so ref_params must not share them."""
    grads, metrics = gradient(state.params, ref_params, arch, algorithm, batch, reference, beta, threshold, parts)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics["grad/norm"] = optax.global_norm(grads)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics
