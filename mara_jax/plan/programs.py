"""The three programs of a training step, from shapes alone: nothing is loaded, allocated or run."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax import config
from mara_jax.parallel import sharding
from mara_jax.plan import work
from mara_jax.policies import lora
from mara_jax.policies.packing import Packing
from mara_jax.policies.parameters import Architecture
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import optim, placement, step
from mara_jax.train.state import Batch

PHASES = ("rollout", "reference", "update")


class Program(NamedTuple):
    """One phase: a jitted function, its arguments (shapes with shardings), and how often its open loops run.

    batch: of the arguments, what belongs to neither policy nor reference nor optimiser.
    """

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    trips: tuple[int, ...]
    batch: Any

    def compile(self) -> Any:
        """The program as XLA compiles it for the devices of the layout in use."""
        return self.function.lower(*self.args, **self.kwargs).compile()

    def flops(self) -> int:
        """Of its matmuls, all devices together, from its jaxpr."""
        return work.flops(self.function, *self.args, trips=self.trips, **self.kwargs)


class Sizes(NamedTuple):
    """A step's shapes: prompts of so many (padded) tokens, samples of each, most tokens of one, rows of a rollout."""

    prompts: int
    prompt_tokens: int
    group: int
    new_tokens: int
    slots: int = 0

    @property
    def rows(self) -> int:
        """Completions decoded at once."""
        return min(self.slots or self.prompts * self.group, self.prompts * self.group)

    @property
    def steps(self) -> int:
        """Of decoding, where every completion has its full length: the first token comes from the prompt."""
        return -(-self.prompts * self.group // self.rows) * (self.new_tokens - 1)


def sizes_of(run: config.LanguageRun, prompt_tokens: int) -> Sizes:
    """A run's shapes, its prompts padded as a rollout pads them."""
    padded = -(-prompt_tokens // 32) * 32
    sizes = run.rollout
    return Sizes(sizes.prompts_per_step, padded, sizes.group_size, sizes.max_new_tokens, sizes.slots)


def all_of(run: config.LanguageRun, arch: Architecture, sizes: Sizes) -> dict[str, Program]:
    """The programs of one step in the layout in use, with every completion at its full length.

    Raises:
      ValueError: rows or parameters that the mesh does not divide.
    """
    tx, parts = optim.make(run.optimiser), run.optimiser.micro_batches
    state = placement.abstract(arch, tx)
    ref_params = placement.abstract_reference(arch)
    params = state.params if arch.lora is None else lora.beside(ref_params, state.params)
    prompts = (_of_prompts(sizes, jnp.int32, sizes.prompt_tokens), _of_prompts(sizes, jnp.int32))
    tokens = _of_groups(sizes, jnp.int32, sizes.new_tokens)
    packing = _packing(run, sizes)
    referred = Program(
        logprobs.reference_hidden,
        (arch, ref_params, *prompts, tokens, packing, parts),
        {},
        (),
        (prompts, tokens, packing),
    )
    rolled = _rollout(run, arch, params, sizes, prompts)
    batch = _batch(run, sizes, prompts, tokens, packing, _hidden(referred, sizes, parts))
    estimator = config.estimator_of(run.algorithm)
    settings = {
        "arch": arch,
        "algorithm": dataclasses.replace(run.algorithm, beta=1.0, threshold=0.0),
        "tx": tx,
        "parts": parts,
        "updates": run.optimiser.updates,
    }
    scalar = _spread((), jnp.float32)
    other = batch if estimator == "reference_samples" else None
    return {
        "rollout": rolled,
        "reference": referred,
        "update": Program(step.update, (state, ref_params, batch, other, scalar, scalar), settings, (), (batch, other)),
    }


def _rollout(run: config.LanguageRun, arch: Architecture, params: Any, sizes: Sizes, prompts: tuple) -> Program:
    number = _of_prompts(sizes, jnp.int32)
    key = _spread((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    kwargs = {
        "first_sample_p": number,
        "group_size": sizes.group,
        "max_new_tokens": sizes.new_tokens,
        "eos_ids": (0,),  # which ones does not matter
        "pad_id": 0,
        "slots": sizes.slots,
    }
    args = (arch, params, *prompts, number, key, _of_prompts(sizes, jnp.float32))
    # Where rows are refilled, one loop of stretches holds another of their steps, one each.
    refilled = sizes.rows < sizes.prompts * sizes.group
    trips = (sizes.steps, rollout.REFILL_EVERY) if refilled else (sizes.steps,)
    return Program(rollout.generate, args, kwargs, trips, (prompts, number))


def _batch(run, sizes: Sizes, prompts, tokens, packing, hidden) -> Batch:
    return Batch(
        prompt_tokens=prompts[0],
        prompt_lengths=prompts[1],
        tokens=tokens,
        lengths=_of_groups(sizes, jnp.int32),
        reward=_of_groups(sizes, jnp.float32),
        answer=_of_groups(sizes, jnp.int32),
        log_mass=_of_prompts(sizes, jnp.float32, 2),  # of two answers, as the 1-2 task has
        ref_hidden=hidden,
        packing=packing,
        sampler_logp=_of_groups(sizes, jnp.float32, sizes.new_tokens) if run.algorithm.truncate else None,
    )


def _hidden(referred: Program, sizes: Sizes, parts: int) -> logprobs.Hidden:
    """The reference's hidden states, as its pass gives them: streams of rows on the devices of those rows."""
    arch, *rest = referred.args
    rest, last = rest[:-1], rest[-1]
    shapes = jax.eval_shape(lambda *args: logprobs.reference_hidden(arch, *args, last), *rest)
    layout = sharding.current()
    if layout is None:
        return shapes
    lead = (None,) if parts > 1 else ()
    prompts, _ = sharding.row_shardings(layout, sizes.prompts, sizes.group // parts)
    last_place = jax.NamedSharding(layout.mesh, jax.P(*lead, *prompts.spec))
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        shapes,
        logprobs.Hidden(last_place, sharding.named_sharding(layout, (*lead, "rows"))),  # pyright: ignore[reportArgumentType]
    )


def _packing(run: config.LanguageRun, sizes: Sizes) -> Packing | None:
    if not run.rollout.length_buckets or sizes.new_tokens == 1:
        return None
    parts, streams, width = run.optimiser.micro_batches, sharding.shard_count("rows"), sizes.new_tokens - 1
    rows = sizes.prompts * sizes.group // parts
    lead = (parts,) if parts > 1 else ()
    shapes = ((*lead, rows, width), (*lead, streams, rows // streams * width))
    layout = sharding.current()
    where = None if layout is None else sharding.named_sharding(layout, (*(None,) * len(lead), "rows"))
    slot, place = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where) for shape in shapes)
    return Packing(slot, place)  # pyright: ignore[reportArgumentType]


def _of_prompts(sizes: Sizes, dtype: Any, *rest: int) -> Any:
    """An array [p, ...] of the batch, where rollouts put it."""
    return _placed((sizes.prompts, *rest), dtype, 0, sizes)


def _of_groups(sizes: Sizes, dtype: Any, *rest: int) -> Any:
    """An array [p, g, ...] of the batch, where rollouts put it."""
    return _placed((sizes.prompts, sizes.group, *rest), dtype, 1, sizes)


def _placed(shape: tuple[int, ...], dtype: Any, which: int, sizes: Sizes) -> Any:
    layout = sharding.current()
    where = None if layout is None else sharding.row_shardings(layout, sizes.prompts, sizes.group)[which]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _spread(shape: tuple[int, ...], dtype: Any) -> Any:
    layout = sharding.current()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=None if layout is None else sharding.replicated(layout))
