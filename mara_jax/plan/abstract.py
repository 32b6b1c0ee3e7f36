"""The programs of a training step, traced on shapes: nothing is loaded, allocated or run."""

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
from mara_jax.policies.policy import Policy
from mara_jax.policies.scores import compiled_scores
from mara_jax.sampling import draw, logprobs, rollout
from mara_jax.train import optim, placement, programs, reference_samples, reward_model
from mara_jax.train.state import Batch, BySampler, remembered

PHASES = ("rollout", "reference", "update")
SCORES = "scores"  # the phase of a reward model, where there is one


class PhaseProgram(NamedTuple):
    """The program of one phase on arguments that are shapes with shardings, and how often its while loops run.

    batch: the arguments that belong to neither policy nor reference nor optimiser nor reward model; calls: of the
    program in a step.
    """

    program: programs.Program
    trips: tuple[int, ...]
    batch: Any
    calls: int = 1

    def flops(self) -> int:
        """FLOPs of the program's matmuls in a step on all devices together, from its jaxpr."""
        return self.calls * work.flops(self.program.function, *self.program.args, trips=self.trips)


class Sizes(NamedTuple):
    """The shapes of a step: prompts, their padded length, samples per prompt, most tokens of a completion, the slots of
    continuous batching (0: a static batch), and members of a population that are side by side (0: a single run)."""

    prompts: int
    prompt_tokens: int
    group: int
    new_tokens: int
    slots: int = 0
    members: int = 0

    @property
    def rows(self) -> int:
        """Completions decoded at once."""
        return min(self.slots or self.prompts * self.group, self.prompts * self.group)

    @property
    def steps(self) -> int:
        """Decoding steps if every completion has its full length; the first token comes from the prefill."""
        return -(-self.prompts * self.group // self.rows) * (self.new_tokens - 1)


def sizes_of(run: config.LanguageRun, prompt_tokens: int) -> Sizes:
    """A run's shapes, its prompts padded as a rollout pads them."""
    padded = -(-prompt_tokens // 32) * 32
    sizes = run.rollout
    return Sizes(sizes.prompts_per_step, padded, sizes.group_size, sizes.max_new_tokens, sizes.slots)


def phase_programs(run: config.LanguageRun, arch: Architecture, sizes: Sizes) -> dict[str, PhaseProgram]:
    """The programs of one step in the layout in use, with every completion at its full length.

    Raises:
      ValueError: rows or parameters that the mesh does not divide.
    """
    tx = optim.make(run.optimiser)
    state, ref_params = placement.abstract(arch, tx, remembered(run, sizes.prompts)), placement.abstract_reference(arch)
    params = state.params if arch.lora is None else lora.beside(ref_params, state.params)
    prompts = prompts_of(sizes)
    policy = Policy(arch, None, (0,), 0, {}, "shapes")  # which tokens end a completion does not matter
    key = _replicated((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    rollout_program = programs.rollout_program(run, policy, params, prompts, key)
    batch = batch_of(run, sizes, prompts)
    reference_program = programs.reference_program(run, arch, ref_params, batch, batch.packing)
    batch = dataclasses.replace(batch, ref_hidden=_hidden(run, sizes, reference_program))
    reads_reference_samples = config.estimator_of(run.algorithm) == "reference_samples"
    batches = BySampler(batch, batch if reads_reference_samples else None)
    update_program = programs.update_program(run, arch, tx, state, ref_params, batches)
    completions = (batch.prompt_tokens, batch.prompt_lengths, batch.tokens, batch.packing)
    return {
        "rollout": PhaseProgram(rollout_program, (sizes.steps,), (prompts.tokens, prompts.lengths, prompts.ids)),
        "reference": PhaseProgram(reference_program, (), completions),
        "update": PhaseProgram(update_program, (), batches),
    }


def scores_program(reward_arch: Architecture, sizes: Sizes) -> PhaseProgram:
    """The program by which a reward model scores a step's completions, each with its prompt at its full length.

    Completions are taken to be as many tokens of the reward model as they are of the policy.

    Raises:
      ValueError: sequences that are longer than its context, or a model that the mesh does not divide.
    """
    longest, most = sizes.prompt_tokens + sizes.new_tokens, reward_arch.max_positions
    if longest > most:
        raise ValueError(
            f"prompts of {sizes.prompt_tokens} tokens and completions of {sizes.new_tokens} are longer than the {most} "
            "that the reward model reads: lower --prompt_tokens or rollout.max_new_tokens"
        )
    rows, width = sizes.prompts * sizes.group * max(1, sizes.members), reward_model.padded_width(longest)
    at_once, shards = reward_model.rows_at_once(rows, lambda count: width), sharding.shard_count("rows")
    layout, count = sharding.current(), -(-at_once // shards) * shards
    where = None if layout is None else sharding.named_sharding(layout, ("rows",))
    tokens_bt, lengths_b = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where) for shape in ((count, width), (count,))
    )
    params = placement.abstract_reference(reward_arch)
    program = programs.Program(compiled_scores, (reward_arch, params, tokens_bt, lengths_b))
    return PhaseProgram(program, (), (tokens_bt, lengths_b), -(-rows // at_once))


def prompts_of(sizes: Sizes) -> rollout.Prompts:
    """The prompts of a step."""
    numbers, ones = _prompt_array(sizes, jnp.int32), _prompt_array(sizes, jnp.float32)
    sampling = draw.SamplingParams(ones, None, None)
    return rollout.Prompts(_prompt_array(sizes, jnp.int32, sizes.prompt_tokens), numbers, numbers, numbers, sampling)


def batch_of(run: config.LanguageRun, sizes: Sizes, prompts: rollout.Prompts) -> Batch:
    """A batch without the reference's hidden states, whose shapes come from its program."""
    unknown: Any = None
    reads_sampler = run.algorithm.truncate or run.guard == "skip"
    samples = {}
    if reference_samples.reads_masses(run.algorithm):
        count = run.reference.samples or reference_samples.BEFORE_TRAINING
        dtypes = {"ref_reward": jnp.float32, "ref_answer": jnp.int32}
        samples = {name: _prompt_array(sizes, dtype, count) for name, dtype in dtypes.items()}
    return Batch(
        prompt_tokens=prompts.tokens,
        prompt_lengths=prompts.lengths,
        tokens=_group_array(sizes, jnp.int32, sizes.new_tokens),
        lengths=_group_array(sizes, jnp.int32),
        reward=_group_array(sizes, jnp.float32),
        answer=_group_array(sizes, jnp.int32),
        prompt_ids=_prompt_array(sizes, jnp.int32),
        ref_hidden=unknown,
        packing=_packing(run, sizes),
        sampler_logp=_group_array(sizes, jnp.float32, sizes.new_tokens) if reads_sampler else None,
        **samples,
    )


def _hidden(run: config.LanguageRun, sizes: Sizes, reference_program: programs.Program) -> logprobs.Hidden:
    """The reference's hidden states, as its program returns them: packed sequences on the devices of their rows."""
    shapes = reference_program.function.eval_shape(*reference_program.args)
    layout, micro_batches = sharding.current(), run.optimiser.micro_batches
    if layout is None:
        return shapes
    lead = (None,) if micro_batches > 1 else ()
    prompts, _ = sharding.row_shardings(layout, sizes.prompts, sizes.group // micro_batches)
    prompt_sharding = jax.NamedSharding(layout.mesh, jax.P(*lead, *prompts.spec))
    row_sharding = sharding.named_sharding(layout, (*lead, "rows"))
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        shapes,
        logprobs.Hidden(prompt_sharding, row_sharding),  # pyright: ignore[reportArgumentType]
    )


def _packing(run: config.LanguageRun, sizes: Sizes) -> Packing | None:
    if not run.rollout.length_buckets or sizes.new_tokens == 1:
        return None
    micro_batches, shards, width = run.optimiser.micro_batches, sharding.shard_count("rows"), sizes.new_tokens - 1
    rows = sizes.prompts * sizes.group // micro_batches
    lead = (micro_batches,) if micro_batches > 1 else ()
    shapes = ((*lead, rows, width), (*lead, shards, rows // shards * width))
    layout = sharding.current()
    row_sharding = None if layout is None else sharding.named_sharding(layout, (*(None,) * len(lead), "rows"))
    slot, place = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row_sharding) for shape in shapes)
    return Packing(slot, place)  # pyright: ignore[reportArgumentType]


def _prompt_array(sizes: Sizes, dtype: Any, *trailing: int) -> Any:
    """An array [p, ...] of the batch, where rollouts put it."""
    return _placed((sizes.prompts, *trailing), dtype, 0, sizes)


def _group_array(sizes: Sizes, dtype: Any, *trailing: int) -> Any:
    """An array [p, g, ...] of the batch, where rollouts put it."""
    return _placed((sizes.prompts, sizes.group, *trailing), dtype, 1, sizes)


def _placed(shape: tuple[int, ...], dtype: Any, which: int, sizes: Sizes) -> Any:
    layout = sharding.current()
    placed = None if layout is None else sharding.row_shardings(layout, sizes.prompts, sizes.group)[which]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)


def _replicated(shape: tuple[int, ...], dtype: Any) -> Any:
    layout = sharding.current()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=None if layout is None else sharding.replicated(layout))
