"""The three phases of a training step, one at a time: rollout, reference, update; to be timed and counted.

Each function calls what `train.loop` calls, on random rewards, and waits for its result.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import config
from mara_jax.hf.shapes import architecture_of
from mara_jax.plan import work
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import ahead, optim, placement, step
from mara_jax.train.state import Batch, State

NAMES = ("rollout", "reference", "update")


@dataclass(frozen=True)
class Case:
    """A step's shapes: prompts as token lists, completions of each, and their longest length.

    The policy's eos_ids end completions; without any, every completion has max_new_tokens.
    """

    name: str
    policy: Policy
    prompts: list[list[int]]
    group_size: int
    max_new_tokens: int
    length_buckets: int = config.Rollout.length_buckets
    algorithm: config.Algorithm = field(default_factory=lambda: config.Algorithm(method="mara", anchor="string"))
    optimiser: config.Optimiser = field(default_factory=config.Optimiser)


# Qwen2-shaped: heads of 64, two key heads, a feed-forward four times as wide, tied embeddings.
SIZES = {"tiny": (4, 256, 2048), "small": (12, 512, 8192)}


def random_policy(name: str, **choices: Any) -> Policy:
    """The policy of a size in SIZES (layers, width, words) or of a published shape, whose layers are scanned: no
    tokenizer, and random weights to be drawn. choices: compute_dtype, remat."""
    if name in SIZES:
        layers, embed, words = SIZES[name]
        choices |= {"heads": embed // 64, "kv_heads": 2, "head_dim": 64, "mlp": 4 * embed, "qkv_bias": True}
        arch = transformer.Architecture("qwen2", words, embed, layers, **choices)
    else:
        arch = architecture_of(name, scan_layers=True, **choices)
    return Policy(arch, None, (), 0, {}, name)


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` lists of `length` token ids, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, vocab_size, (count, length)).tolist()


def fresh_state(case: Case, params: Any) -> State:
    """A copy of the parameters with a fresh optimiser."""
    return placement.fresh(case.policy.architecture, params, _transform(case.optimiser))


def roll(case: Case, params: Any, seed: int) -> rollout.Rollout:
    """One rollout of the case's prompts."""
    drawn = rollout.sample(
        case.policy,
        params,
        case.prompts,
        key=jax.random.key(seed),
        group_size=case.group_size,
        max_new_tokens=case.max_new_tokens,
    )
    return jax.block_until_ready(drawn)


def refer(case: Case, ref_params: Any, drawn: rollout.Rollout, seed: int) -> Batch:
    """What the reference says of a rollout, and random rewards of 0 and 1."""
    packing = _packing(case, drawn)
    ref_hidden = logprobs.reference_hidden(*_reference_call(case, ref_params, drawn, packing))
    return jax.block_until_ready(_batch(case, drawn, ref_hidden, packing, seed))


def shapes(case: Case, params: Any) -> tuple[rollout.Rollout, Batch]:
    """A rollout in which nothing ends early, and its batch, as `counted` needs them: no model is run."""
    tokens_ps, lengths_p = rollout.pad_prompts(case.prompts, case.policy.pad_id)
    size = (len(case.prompts), case.group_size)
    zeros, logp = (jnp.zeros((*size, case.max_new_tokens), dtype) for dtype in (jnp.int32, jnp.float32))
    lengths_pg = np.full(size, case.max_new_tokens, np.int32)
    drawn = rollout.Rollout(
        zeros,
        logp,
        jnp.asarray(lengths_pg),
        jnp.ones(size, bool),
        [],
        jnp.asarray(tokens_ps),
        jnp.asarray(lengths_p),
    )
    arch, *rest = _reference_call(case, params, drawn, packing := _packing(case, drawn))
    *rest, parts = rest
    ref_hidden = jax.eval_shape(lambda *args: logprobs.reference_hidden(arch, *args, parts), *rest)
    return drawn, _batch(case, drawn, ref_hidden, packing, seed=0)


def _packing(case: Case, drawn: rollout.Rollout):
    width, parts = drawn.tokens.shape[-1], case.optimiser.micro_batches
    return logprobs.packed(np.asarray(drawn.lengths), width, case.length_buckets, parts=parts)


def _batch(case: Case, drawn: rollout.Rollout, ref_hidden: Any, packing, seed: int) -> Batch:
    reward_pg = np.random.default_rng(seed).integers(0, 2, drawn.lengths.shape).astype(np.float32)
    return Batch(
        prompt_tokens=drawn.prompt_tokens,
        prompt_lengths=drawn.prompt_lengths,
        tokens=drawn.tokens,
        lengths=drawn.lengths,
        reward=jnp.asarray(reward_pg),
        answer=jnp.asarray(reward_pg, jnp.int32) - 1,
        log_mass=jnp.full((len(case.prompts), 1), -1.0),
        ref_hidden=ref_hidden,
        packing=packing,
        sampler_logp=drawn.logp if case.algorithm.truncate else None,
    )


def compile_update(case: Case, state: State, ref_params: Any, batch: Batch, *, all_sizes: bool = False) -> None:
    """What a run's first step does before its first update; all_sizes: for every length bucket (compile_ahead)."""

    def lowered(batch: Batch, other: Batch | None = None):
        args, settings = _update_call(case, state, ref_params, batch)
        return step.update.lower(*args, **settings)

    if not all_sizes:
        return ahead.compile_one(lambda: lowered(batch))

    def refer(batch: Batch):
        return logprobs.reference_hidden(*_reference_call(case, ref_params, batch, batch.packing))

    return ahead.compile_all(batch, None, refer, lowered, case.length_buckets, case.optimiser.micro_batches)


def update(case: Case, state: State, ref_params: Any, batch: Batch) -> State:
    """One update; the old state is given up."""
    args, settings = _update_call(case, state, ref_params, batch)
    return jax.block_until_ready(step.update(*args, **settings)[0])


def _reference_call(case: Case, ref_params: Any, drawn: rollout.Rollout | Batch, packing) -> tuple:
    arch = case.policy.architecture
    parts = case.optimiser.micro_batches
    return arch, ref_params, drawn.prompt_tokens, drawn.prompt_lengths, drawn.tokens, packing, parts


def _update_call(case: Case, state: State, ref_params: Any, batch: Batch) -> tuple[tuple, dict[str, Any]]:
    beta, threshold = jnp.float32(case.algorithm.beta), jnp.float32(case.algorithm.threshold)
    settings = {
        "arch": case.policy.architecture,
        "algorithm": dataclasses.replace(case.algorithm, beta=1.0, threshold=0.0),
        "tx": _transform(case.optimiser),
        "parts": case.optimiser.micro_batches,
    }
    return (state, ref_params, batch, None, beta, threshold), settings


_TRANSFORMS: dict[config.Optimiser, Any] = {}


def _transform(cfg: config.Optimiser):
    """One object for each setting: another would compile the update again."""
    return _TRANSFORMS.setdefault(cfg, optim.make(cfg))


def _rollout_call(case: Case, params: Any, drawn: rollout.Rollout) -> tuple[tuple, dict[str, Any]]:
    policy, prompts = case.policy, drawn.prompt_lengths.shape[0]
    numbers, ones = jnp.zeros(prompts, jnp.int32), jnp.ones(prompts)
    of = (policy.architecture, params, drawn.prompt_tokens, drawn.prompt_lengths, numbers, jax.random.key(0), ones)
    settings = {
        "first_sample_p": numbers,
        "group_size": case.group_size,
        "max_new_tokens": case.max_new_tokens,
        "eos_ids": policy.eos_ids,
        "pad_id": policy.pad_id,
    }
    return of, settings


def counted(case: Case, params: Any, drawn: rollout.Rollout, batch: Batch) -> work.Least:
    """FLOPs of the three programs as they were run for this rollout, counted from their jaxprs."""
    args, settings = _rollout_call(case, params, drawn)
    trips = (int(np.max(drawn.lengths)) - 1,)
    rolled = work.flops(rollout.generate, *args, trips=trips, **settings)
    referred = work.flops(logprobs.reference_hidden, *_reference_call(case, params, drawn, batch.packing))
    state: Any = jax.eval_shape(lambda p: fresh_state(case, p), params)
    args, settings = _update_call(case, state, params, batch)
    return work.Least(rolled, referred, work.flops(step.update, *args, **settings))


def least(case: Case, drawn: rollout.Rollout) -> work.Least:
    """The analytic least of the same three."""
    arch = case.policy.architecture
    return work.least(arch, np.asarray(drawn.prompt_lengths), np.asarray(drawn.lengths))
