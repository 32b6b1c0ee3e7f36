"""The pure update: log-probabilities, objective, gradient, optimiser."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mara_jax import config
from mara_jax.policies import lora, transformer
from mara_jax.sampling import head, logprobs
from mara_jax.train import placement
from mara_jax.train.objective import Scored, objective
from mara_jax.train.state import Batch, State


class Old(NamedTuple):
    """Log-probs [p, g, t] of the policy before a rollout's first update; in that update they are yet to be found."""

    first: jax.Array
    logp: jax.Array


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
    value, (metrics, _) = _loss(params, ref_params, arch, algorithm, batch, reference, beta, threshold, None)
    return value, metrics


def _loss(params, ref_params, arch, algorithm, batch, reference, beta, threshold, old: Old | None):
    """`loss`, with the log-probs of the batch's tokens beside its metrics."""
    both = (batch, _used(algorithm, reference))
    stats = jax.tree.map(lambda one: _stats(params, ref_params, arch, one), both, is_leaf=_is_batch)
    value, metrics = _of_stats(stats, both, algorithm, beta, threshold, old)
    return value, (metrics, stats[0].logp)


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
    of = (params, ref_params, arch, algorithm, batch, reference, beta, threshold)
    grads, (metrics, _) = _gradient(*of, parts, None)
    return grads, metrics


def _gradient(params, ref_params, arch, algorithm, batch, reference, beta, threshold, parts: int, old: Old | None):
    """`gradient`, with the log-probs of the batch's tokens beside its metrics."""
    if parts == 1:
        of = (params, ref_params, arch, algorithm, batch, reference, beta, threshold, old)
        return jax.grad(_loss, has_aux=True)(*of)
    both = (batch, _used(algorithm, reference))
    cut = jax.tree.map(functools.partial(_cut, parts), both, is_leaf=_is_batch)

    def stats_of(params, part):
        return jax.tree.map(lambda one: _stats(params, ref_params, arch, one), part, is_leaf=_is_batch)

    stats = jax.tree.map(logprobs.joined, jax.lax.map(lambda part: stats_of(params, part), cut))

    def of_logp(logp):
        changed = tuple(None if one is None else one._replace(logp=x) for one, x in zip(stats, logp, strict=True))
        return _of_stats(changed, both, algorithm, beta, threshold, old)

    logp = tuple(None if one is None else one.logp for one in stats)
    by_logp, metrics = jax.grad(of_logp, has_aux=True)(logp)

    def add(total, xs):
        part, by_logp = xs
        logp_of = lambda params: tuple(None if one is None else one.logp for one in stats_of(params, part))  # noqa: E731
        (more,) = jax.vjp(logp_of, params)[1](by_logp)
        return jax.tree.map(jnp.add, total, more), None

    cut_by_logp = jax.tree.map(lambda x: logprobs.split(x, parts), by_logp)
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (cut, cut_by_logp))
    return total, (metrics, stats[0].logp)


def _is_batch(x: Any) -> bool:
    return isinstance(x, Batch)


def _used(algorithm: config.Algorithm, reference: Batch | None) -> Batch | None:
    return reference if config.estimator_of(algorithm) == "reference_samples" else None


def _cut(parts: int, batch: Batch) -> Batch:
    """What `_stats` reads of a batch, part by part on a new leading axis."""
    whole = ("prompt_tokens", "prompt_lengths", "log_mass")
    cut = {name: jnp.broadcast_to(x, (parts, *x.shape)) for name in whole for x in [getattr(batch, name)]}
    cut |= {name: logprobs.split(getattr(batch, name), parts) for name in ("tokens", "lengths", "reward", "answer")}
    # The packing and the reference's hidden states have that axis already; the sampler's log-probs are not read here.
    return dataclasses.replace(batch, sampler_logp=None, **cut)


def _of_stats(stats: tuple, both: tuple, algorithm: config.Algorithm, beta, threshold, old: Old | None):
    """`objective` of the statistics of the batch, and where there are any of the reference's samples, and metrics."""
    scored, drawn = (None if one is None else _scored(one, batch) for one, batch in zip(stats, both, strict=True))
    assert scored is not None
    scored = scored._replace(sampler_logp=both[0].sampler_logp)
    if old is not None:
        logp_pgt = jax.lax.stop_gradient(scored.logp)
        scored = scored._replace(old_logp=jnp.where(old.first, logp_pgt, old.logp))
    value, metrics = objective(algorithm, scored, drawn, beta, threshold)
    return value, metrics | {
        "kl/reverse": jnp.mean(jnp.sum(stats[0].kl * scored.mask, axis=-1)),
        "length/mean": jnp.mean(both[0].lengths.astype(jnp.float32)),
    }


def _stats(params, ref_params, arch, batch: Batch) -> head.Stats:
    """What policy and reference say of each token, [p, g, t]."""
    params = lora.attached(arch, ref_params, params)
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


@functools.partial(jax.jit, static_argnames=("arch", "algorithm", "tx", "parts", "updates"), donate_argnames=("state",))
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
    updates: int = 1,
) -> tuple[State, dict[str, jax.Array]]:
    """One step: `updates` of the optimiser, each on the whole batch, which the first one's policy has drawn.

    The old state's buffers are given up, so ref_params must not share them. Metrics are those of the first update,
    which are the policy's that drew the batch; where there are more, ratios are those of the last, the stalest one.
    """

    def once(state: State, old: Old | None):
        of = (state.params, ref_params, arch, algorithm, batch, reference, beta, threshold)
        grads, (metrics, logp) = _gradient(*of, parts, old)
        grads = placement.constrain_params(grads, arch)
        changes, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics["grad/norm"] = optax.global_norm(grads)
        new = State(state.step, optax.apply_updates(state.params, changes), opt_state)
        return placement.constrain(new, arch, tx), metrics, logp

    def again(carry, number: jax.Array):
        state, old_logp = carry
        first = number == 0
        state, metrics, logp = once(state, Old(first, old_logp))
        return (state, jnp.where(first, logp, old_logp)), metrics

    if updates == 1:
        state, metrics, _ = once(state, None)
    else:
        unknown = jnp.zeros(batch.tokens.shape, placement.param_dtype(arch))
        (state, _), rows = jax.lax.scan(again, (state, unknown), jnp.arange(updates))
        metrics = {name: row[-1 if _is_of_ratios(name) else 0] for name, row in rows.items()}
    return dataclasses.replace(state, step=state.step + 1), metrics


def _is_of_ratios(name: str) -> bool:
    return name.startswith("ratio/") or name == "objective/clipped_fraction"
