"""One update of a prior: next-token cross-entropy, Adam."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mara_jax.hf import smiles_tokenizer
from mara_jax.policies.parameters import Architecture
from mara_jax.policies.policy import Policy
from mara_jax.prior.batches import Batch, TrainingSet
from mara_jax.prior.settings import HEAD_DIM, MAX_POSITIONS, Settings
from mara_jax.sampling import logprobs
from mara_jax.train import placement
from mara_jax.train.state import State

LAST_RATE = 0.01  # of the highest learning rate


def policy_of(settings: Settings, molecules: TrainingSet) -> Policy:
    """The untrained prior, without parameters: a decoder of Llama's shape with tied embeddings."""
    tokenizer = molecules.tokenizer
    arch = Architecture(
        family="llama",
        vocab_size=len(tokenizer),
        embed=HEAD_DIM * settings.heads,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.heads,
        head_dim=HEAD_DIM,
        mlp=settings.feed_forward,
        tie_embeddings=True,
        max_positions=max(MAX_POSITIONS, molecules.width + 1),
        compute_dtype=settings.compute_dtype,
    )
    vocabulary = tokenizer.get_vocab()
    ends, pad = (vocabulary[smiles_tokenizer.EOS],), vocabulary[smiles_tokenizer.PAD]
    return Policy(arch, tokenizer, ends, pad, {}, "the prior")


def learning_rate(settings: Settings) -> optax.Schedule:
    """The learning rate by updates done: it rises linearly, then falls until the last update, or stays."""
    highest, rise = settings.learning_rate, min(settings.rise, settings.steps - 1)
    up = optax.linear_schedule(highest / (rise + 1), highest, rise)
    left = max(settings.steps - rise, 1)
    down = {
        "cosine": optax.cosine_decay_schedule(highest, left, alpha=LAST_RATE),
        "linear": optax.linear_schedule(highest, highest * LAST_RATE, left),
        "none": optax.constant_schedule(highest),
    }[settings.decay]
    return optax.join_schedules([up, down], [rise])


@functools.cache
def optimiser(settings: Settings) -> optax.GradientTransformation:
    """Adam with the run's schedule; one object for equal settings, as it is a static argument of `update`."""
    clip = optax.clip_by_global_norm(settings.max_grad_norm) if settings.max_grad_norm else optax.identity()
    return optax.chain(clip, optax.adam(learning_rate(settings), b2=0.98))


def nll(arch: Architecture, params: Any, batch: Batch, bos_id: int) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of a batch's molecules, EOS included: its sum (nats), and how many tokens it is of."""
    tokens_pgt, lengths_pg = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
    prompt_ps, length_p = jnp.full((1, 1), bos_id, jnp.int32), jnp.ones(1, jnp.int32)
    logp_pgt = logprobs.completion_logps(arch, params, prompt_ps, length_p, tokens_pgt, batch.packing)
    return -jnp.sum(logp_pgt * logprobs.mask(lengths_pg, tokens_pgt.shape[-1])), jnp.sum(lengths_pg)


@functools.partial(jax.jit, static_argnames=("arch", "tx", "bos_id"), donate_argnames=("state",))
def update(state: State, batch: Batch, *, arch, tx, bos_id: int) -> tuple[State, jax.Array]:
    """One step down the mean over a batch's tokens; returns it too, as it was before (nats a token)."""

    def mean_nll(params: Any) -> jax.Array:
        total, count = nll(arch, params, batch, bos_id)
        return total / jnp.maximum(count, 1)

    value, grads = jax.value_and_grad(mean_nll)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), value


_summed_nll = jax.jit(nll, static_argnums=(0, 3))


def held_out_loss(policy: Policy, params: Any, molecules: TrainingSet) -> float | None:
    """Mean negative log-likelihood of the molecules that are held out (nats a molecule); None without any."""
    bos_id, total, count = policy.tokenizer.bos_token_id, 0.0, 0
    for batch in molecules.held_out_batches():
        total += float(_summed_nll(policy.architecture, params, batch, bos_id)[0])
        count += int((batch.lengths > 0).sum())
    return total / count if count else None


def fresh(policy: Policy, params: Any, tx: optax.GradientTransformation) -> State:
    """The state before the first update."""
    return placement.fresh(policy.architecture, params, tx)
