"""The pure update: log-probabilities, objective, gradient, optimiser."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mara_jax import config
from mara_jax.core import augment, method_rules, moving_threshold
from mara_jax.core.scored import Algorithm, Scored
from mara_jax.core.targets import Scalar
from mara_jax.policies import lora, transformer
from mara_jax.sampling import head, logprobs
from mara_jax.train import finite, placement
from mara_jax.train.state import Batch, BySampler, Hyperparameters, State

REF_LOGP = "completions/ref_logp"  # of the metrics: [p, g], the reference's log-prob of each completion (nats)


class Choices(NamedTuple):
    """What is static in an update: another value is another compiled program.

    algorithm: its beta, threshold and eta are not read, see `state.Hyperparameters`; micro_batches: how many the batch
    is split into; updates: of the optimiser, each on the whole batch; skip: whether a step that is not finite
    leaves the state as it was.
    """

    arch: transformer.Architecture
    algorithm: config.Algorithm
    tx: optax.GradientTransformation
    micro_batches: int = 1
    updates: int = 1
    skip: bool = False


class OldPolicy(NamedTuple):
    """Log-probs [p, g, t] of the policy before a rollout's first update; in that update (`is_current`) they are the
    policy's own, and `logp` is not read."""

    is_current: jax.Array
    logp: jax.Array


class Auxiliary(NamedTuple):
    """What a loss gives besides its value: metrics (scalars, and REF_LOGP), the log-probs [p, g, t] of the policy's
    samples, and each prompt's log Z [p] as learned from them, where the objective learns it."""

    metrics: dict[str, jax.Array]
    logp: jax.Array
    log_z: jax.Array | None = None


def loss(
    params: Any,
    ref_params: Any,
    batches: BySampler,
    hyper: Hyperparameters,
    choices: Choices,
    old: OldPolicy | None = None,
    log_z: jax.Array | None = None,
) -> tuple[jax.Array, Auxiliary]:
    """The scalar to minimise on the batches, in one forward pass.

    Args:
      params: what is trained: all of the policy's parameters, or its adapter's.
      ref_params: the reference policy's.
      batches: completions of the policy and, where the estimator reads them, of the reference policy.
      old: None where the policy itself drew its batch.
      log_z: [p] of the batch's prompts, -inf for one not visited before; where the objective learns it.
    """
    stats = _each(lambda batch: _token_stats(params, ref_params, batch, choices.arch), batches)
    return _loss_of_stats(stats, batches, hyper, choices, old, log_z)


def gradient(
    params: Any,
    ref_params: Any,
    batches: BySampler,
    hyper: Hyperparameters,
    choices: Choices,
    old: OldPolicy | None = None,
    log_z: jax.Array | None = None,
) -> tuple[Any, Auxiliary]:
    """The gradient of `loss`, accumulated over `choices.micro_batches`; arguments as of `loss`.

    Memory falls with the number of micro-batches, the result stays the same: baselines and anchors see whole groups,
    because the objective is first differentiated by the log-probs of all samples (from forward passes alone), and each
    micro-batch then backpropagates its share of that. This costs one more forward pass; one micro-batch costs none.
    """
    count = choices.micro_batches
    if count == 1:
        return jax.grad(loss, has_aux=True)(params, ref_params, batches, hyper, choices, old, log_z)
    micro_batches = _each(functools.partial(_split, count), batches)

    def stats_of(params, micro_batch: BySampler) -> BySampler:
        return _each(lambda batch: _token_stats(params, ref_params, batch, choices.arch), micro_batch)

    stats = jax.lax.map(lambda micro_batch: stats_of(params, micro_batch), micro_batches)
    stats = jax.tree.map(logprobs.joined, stats)

    def loss_of_logp(logp: BySampler):
        changed = _each(lambda stats, logp: stats._replace(logp=logp), stats, logp)
        return _loss_of_stats(changed, batches, hyper, choices, old, log_z)

    logp_gradient, auxiliary = jax.grad(loss_of_logp, has_aux=True)(_logp_of(stats))

    def accumulate(total, xs):
        micro_batch, logp_gradient = xs
        _, backward = jax.vjp(lambda params: _logp_of(stats_of(params, micro_batch)), params)
        return jax.tree.map(jnp.add, total, *backward(logp_gradient)), None

    logp_gradients = jax.tree.map(lambda x: logprobs.split(x, count), logp_gradient)
    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(accumulate, zeros, (micro_batches, logp_gradients))
    return total, auxiliary


def _each(function: Callable[..., Any], *values: BySampler) -> BySampler:
    """A function of what belongs to the policy's samples and, where there are any, to the reference's."""
    reference = None if values[0].reference is None else function(*(value.reference for value in values))
    return BySampler(function(*(value.policy for value in values)), reference)


def _logp_of(stats: BySampler) -> BySampler:
    return _each(lambda stats: stats.logp, stats)


def _split(count: int, batch: Batch) -> Batch:
    """What `_token_stats` reads of a batch as micro-batches, on a new leading axis."""
    shared = ("prompt_tokens", "prompt_lengths", "prompt_ids")
    arrays = {name: jnp.broadcast_to(x, (count, *x.shape)) for name in shared for x in [getattr(batch, name)]}
    for name in ("tokens", "lengths", "reward", "answer"):
        arrays[name] = logprobs.split(getattr(batch, name), count)
    # The packing and the reference's hidden states have that axis already; the rest is not read here.
    unread = dict.fromkeys(("sampler_logp", "counted", "ref_reward", "ref_answer", "log_mass"))
    return dataclasses.replace(batch, **unread, **arrays)


def _token_stats(params, ref_params, batch: Batch, arch: transformer.Architecture) -> head.Stats:
    """What policy and reference say of each token, [p, g, t]."""
    params = lora.attached(arch, ref_params, params)
    hidden = logprobs.completion_hidden(
        arch, params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens, batch.packing
    )
    return logprobs.token_stats(
        arch, params, hidden, batch.tokens, batch.packing, ref_params=ref_params, ref_hidden=batch.ref_hidden
    )


def _loss_of_stats(
    stats: BySampler,
    batches: BySampler,
    hyper: Hyperparameters,
    choices: Choices,
    old: OldPolicy | None,
    log_z: jax.Array | None,
):
    """The method's loss of the tokens' statistics, with metrics."""
    masses = _masses(batches, hyper, choices.algorithm)
    scored = _scored(stats.policy, batches.policy, masses)
    scored = scored._replace(sampler_logp=batches.policy.sampler_logp, counted=batches.policy.counted)
    reference = None if stats.reference is None else _scored(stats.reference, batches.reference, masses)
    if old is not None:
        logp_pgt = jax.lax.stop_gradient(scored.logp)
        scored = scored._replace(old_logp=jnp.where(old.is_current, logp_pgt, old.logp))
    if log_z is not None:
        estimate_p = method_rules.log_z_estimate(choices.algorithm, scored, hyper)
        log_z = jnp.where(log_z == -jnp.inf, estimate_p, log_z)  # a first visit has nothing better than its own group
        scored = scored._replace(prompt_log_z=log_z)
        log_z = log_z + 2 * method_rules.LOG_Z_STEP * (estimate_p - log_z)
    value, metrics = method_rules.loss(choices.algorithm, scored, reference, hyper)
    metrics |= _of_own_completions(stats.policy, scored, batches.policy)
    return value, Auxiliary(metrics, scored.logp, log_z)


def _of_own_completions(stats: head.Stats, scored: Scored, batch: Batch) -> dict[str, jax.Array]:
    """Metrics of the completions that the policy itself has drawn; replayed ones stand behind them in each group."""
    assert stats.kl is not None
    own = _own(batch)
    logp_pg = jax.lax.stop_gradient(jnp.sum(scored.logp * scored.mask, axis=-1))[:, :own]
    ref_logp_pg = jax.lax.stop_gradient(scored.ref_logp)[:, :own]
    metrics = {
        "kl/reverse": jnp.mean(jnp.sum(stats.kl * scored.mask, axis=-1)[:, :own]),
        "length/mean": jnp.mean(batch.lengths[:, :own].astype(jnp.float32)),
        REF_LOGP: ref_logp_pg,
    }
    if batch.replayed:
        metrics |= {"reward/mean": jnp.mean(scored.reward[:, :own]), "logp/mean": jnp.mean(logp_pg)}
        metrics |= {"kl/k1": jnp.mean(logp_pg - ref_logp_pg)}
    return metrics


def _own(batch: Batch) -> int:
    """How many of each group's completions, the first ones, the policy itself has drawn."""
    return batch.reward.shape[1] - batch.replayed


class Masses(NamedTuple):
    """Log-masses under the reference: of each answer index [p, a]; of one unseen [p], where samples give the others."""

    log_mass: jax.Array | None
    unseen: jax.Array | None


def _masses(batches: BySampler, hyper: Hyperparameters, algorithm: config.Algorithm) -> Masses:
    """None, None where the method reads none."""
    batch = batches.policy
    if batch.ref_reward is None or batch.ref_answer is None:
        return Masses(None if batch.log_mass is None else _of_good_answers(batch, hyper.threshold), None)
    groups = 1 if batches.reference is None else 2
    return answer_masses(batch.ref_reward, batch.ref_answer, groups * batch.reward.shape[1], hyper, algorithm)


def _of_good_answers(batch: Batch, threshold: Scalar) -> jax.Array:
    """The batch's log-masses, -inf where no completion of the answer is good: it may have been in an earlier batch."""
    assert batch.log_mass is not None
    count = batch.log_mass.shape[-1]
    good_pg = jnp.where((batch.reward >= threshold) & (batch.answer >= 0), batch.answer, count)
    known_pa = jax.vmap(lambda good_g: jnp.zeros(count, bool).at[good_g].set(True, mode="drop"))(good_pg)
    return jnp.where(known_pa, batch.log_mass, -jnp.inf)


def answer_masses(
    ref_reward_pn: jax.Array, ref_answer_pn: jax.Array, group_size: int, hyper: Hyperparameters, algorithm: Algorithm
) -> Masses:
    """The masses that MARA over answers reads.

    Args:
      ref_reward_pn, ref_answer_pn: scores of the reference policy's samples under each prompt, answers by index.
      group_size: completions of a prompt, which may have other answers: every index is below the number of both.
    """
    count = ref_reward_pn.shape[1] + group_size
    settings = (hyper.beta, hyper.threshold, algorithm.kl)
    return Masses(
        augment.answer_log_mass(ref_reward_pn, ref_answer_pn, count, *settings),
        augment.unseen_log_mass(ref_reward_pn, *settings),
    )


def _scored(stats: head.Stats, batch: Batch, masses: Masses) -> Scored:
    mask_pgt = logprobs.mask(batch.lengths, batch.tokens.shape[-1])
    assert stats.ref_logp is not None
    ref_logp_pg = jnp.sum(stats.ref_logp * mask_pgt, axis=-1)
    scored = Scored(stats.logp, mask_pgt, ref_logp_pg, batch.reward, batch.answer, masses.log_mass)
    return scored._replace(ref_token_logp=stats.ref_logp, unseen_log_mass=masses.unseen)


@functools.partial(jax.jit, static_argnames=("choices",), donate_argnames=("state",))
def update(
    state: State,
    ref_params: Any,
    batches: BySampler,
    hyper: Hyperparameters,
    choices: Choices,
    rate: jax.Array | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One step of a run: `choices.updates` of the optimiser, each on the whole batch.

    The old state's buffers are donated, so ref_params must not share them.

    Args:
      state, ref_params: of the policy and of the frozen reference policy.
      batches: as in `loss`; the policy that the first update changes has drawn its batch.
      hyper: traced, so that they can be swept.
      choices: static.
      rate: factor of the optimiser's changes, traced: a learning rate over that which `choices.tx` has; None for 1.

    Returns:
      The new state and metrics: those of the first update, whose policy drew the batch; where there are more,
      importance ratios are those of the last, which is furthest from it. Where one of them has a value that is not
      finite, they are the first such update's.
    """
    arch, before = choices.arch, state
    hyper, rewards, of_threshold = _at_moved_threshold(state.rewards, batches.policy, hyper, choices.algorithm)

    def update_once(state: State, old: OldPolicy | None):
        known = None if state.log_z is None else state.log_z[batches.policy.prompt_ids]
        grads, (metrics, logp, learned) = gradient(state.params, ref_params, batches, hyper, choices, old, known)
        grads = placement.constrain_params(grads, arch)
        changes, opt_state = choices.tx.update(grads, state.opt_state, state.params)
        if rate is not None:
            changes = jax.tree.map(lambda change: jnp.asarray(rate, change.dtype) * change, changes)
        metrics["grad/norm"] = optax.global_norm(grads)
        if state.log_z is not None:
            assert learned is not None
            learned = _put(state.log_z, batches.policy.prompt_ids, learned)
        state = State(state.step, optax.apply_updates(state.params, changes), opt_state, learned, state.rewards)
        return placement.constrain(state, arch, choices.tx), metrics, logp

    def update_again(carry, number: jax.Array):
        state, old_logp = carry
        first = number == 0
        state, metrics, logp = update_once(state, OldPolicy(first, old_logp))
        return (state, jnp.where(first, logp, old_logp)), metrics

    if choices.updates == 1:
        state, metrics, _ = update_once(state, None)
    else:
        unknown = jnp.zeros(batches.policy.tokens.shape, placement.param_dtype(arch))
        (state, _), rows = jax.lax.scan(update_again, (state, unknown), jnp.arange(choices.updates))
        told = jnp.argmin(finite.is_finite(rows))  # the first where all are finite
        metrics = {name: row[-1 if _is_of_ratios(name) else told] for name, row in rows.items()}
    metrics, state = metrics | of_threshold, dataclasses.replace(state, rewards=rewards)
    if choices.skip:
        good = finite.is_finite(metrics) & finite.all_usable(state.params)
        if batches.policy.sampler_logp is not None:
            good &= jnp.all(jnp.isfinite(batches.policy.sampler_logp))
        state = jax.tree.map(lambda new, old: jnp.where(good, new, old), state, before)
        metrics["guard/skipped"] = 1.0 - good
    return dataclasses.replace(state, step=before.step + 1), metrics


def _at_moved_threshold(
    rewards: jax.Array | None, batch: Batch, hyper: Hyperparameters, algorithm: config.Algorithm
) -> tuple[Hyperparameters, jax.Array | None, dict[str, jax.Array]]:
    """The numbers of an update whose threshold is a percentile of the rewards before; these with the batch's; metrics.

    The batch joins them only after its own threshold is known, so that its signal does not depend on itself by it.
    """
    if rewards is None:
        return hyper, None, {}
    tau = moving_threshold.threshold(rewards, algorithm.threshold_percentile, hyper.threshold)
    reward_pg = batch.reward[:, : _own(batch)]
    two = moving_threshold.groups_with_two(reward_pg, tau, batch.counted)
    rewards = placement.constrain_replicated(moving_threshold.with_batch(rewards, reward_pg, batch.counted))
    return hyper._replace(threshold=tau), rewards, {"mara/threshold": tau, "mara/groups_with_two_good": two}


def threshold_of(algorithm: config.Algorithm, state: State) -> np.floating:
    """The reward from which a completion of the next update is good."""
    if state.rewards is None:
        return np.float32(algorithm.threshold)
    tau = moving_threshold.threshold(state.rewards, algorithm.threshold_percentile, algorithm.threshold)
    return np.float32(tau)


def _put(log_z_n: jax.Array, prompt_ids: jax.Array, learned_p: jax.Array) -> jax.Array:
    """Each prompt's log Z with that of a batch's prompts; a prompt that is there twice gets the mean."""
    count_n = jnp.zeros(log_z_n.shape).at[prompt_ids].add(1)
    total_n = jnp.zeros_like(log_z_n).at[prompt_ids].add(learned_p)
    return jnp.where(count_n > 0, total_n / jnp.maximum(count_n, 1), log_z_n)


def _is_of_ratios(name: str) -> bool:
    return name.startswith("ratio/") or name == "objective/clipped_fraction"
