"""The programs of a step of a population's members side by side, traced on shapes, and what a device then holds."""

import dataclasses
from typing import Any

import jax
import numpy as np

from mara_jax import config
from mara_jax.parallel import sharding
from mara_jax.plan.abstract import PhaseProgram, Sizes, batch_of, prompts_of
from mara_jax.policies.parameters import Architecture
from mara_jax.sampling import rollout
from mara_jax.train import capacity, optim, placement, programs
from mara_jax.train.capacity import Held
from mara_jax.train.population import programs as of_members
from mara_jax.train.state import BySampler, remembered


def at_once(run: config.LanguageRun, arch: Architecture, limit: float, reward_arch: Architecture | None = None) -> int:
    """How many members there are in the first wave, on the devices of the layout in use.

    Args:
      limit: bytes of each device; reward_arch: as of `capacity.held`.
    """
    first, *others = (programs.static_algorithm(one.run) for one in config.members(run))
    most = run.population.at_once or capacity.members_at_once(run, arch, limit, reward_arch)
    return capacity.wave_sizes(1 + others.count(first), most)[0]


def on_a_device(members: int) -> int:
    """How many of the members that are side by side a device of the layout in use computes."""
    devices = sharding.shard_count("members")
    return members // devices if members % devices == 0 else members


def held(run: config.LanguageRun, arch: Architecture, members: int, reward_arch: Architecture | None = None) -> Held:
    """What a device holds: the reference policy and a reward model once, all else of each of its members."""
    with sharding.without_layout():
        one = capacity.held(run, arch, reward_arch)
    own = on_a_device(members)
    return Held(own * one.parameters, one.reference, own * one.optimiser, own * one.cache, one.reward_model)


def phase_programs(run: config.LanguageRun, arch: Architecture, sizes: Sizes) -> dict[str, PhaseProgram]:
    """As `abstract.phase_programs`, of `sizes.members` side by side; run: the first of them."""
    tx, more = optim.make(run.optimiser), remembered(run, sizes.prompts)
    ref_params = placement.abstract_reference(arch)
    with sharding.without_layout():
        prompts = prompts_of(sizes)
        key = jax.eval_shape(lambda: jax.random.key(0))
        one = placement.abstract(arch, tx, more), prompts, batch_of(run, sizes, prompts), key
    state, prompts, batch, key = stacked(one, sizes.members)
    settings = rollout.Settings(sizes.group, sizes.new_tokens, (0,), 0)
    generate = programs.Program(of_members.generate, (arch, ref_params, state.params, prompts, key, settings))
    completions = (batch.prompt_tokens, batch.prompt_lengths, batch.tokens)
    arguments = (arch, ref_params, completions, batch.packing, run.optimiser.micro_batches, False)
    reference = programs.Program(of_members.reference_hidden, arguments)
    ref_hidden = placed(reference.function.eval_shape(*reference.args), sizes.members)
    batch = dataclasses.replace(batch, ref_hidden=ref_hidden)
    batches = BySampler(batch, batch if config.estimator_of(run.algorithm) == "reference_samples" else None)
    hyper = stacked(programs.hyperparameters(run), sizes.members)
    choices = programs.static_choices(run, arch, tx)
    rates = stacked(np.float64(1), sizes.members)
    update = programs.Program(of_members.update, (state, ref_params, batches, hyper, rates, choices))
    return {
        "rollout": PhaseProgram(generate, (sizes.steps,), (prompts.tokens, prompts.lengths, prompts.ids)),
        "reference": PhaseProgram(reference, (), (completions, batch.packing)),
        "update": PhaseProgram(update, (), batches),
    }


def stacked(tree: Any, members: int) -> Any:
    """Shapes with a leading axis of members, on the devices that have them."""
    return placed(jax.tree.map(lambda array: jax.ShapeDtypeStruct((members, *array.shape), array.dtype), tree), members)


def placed(tree: Any, members: int) -> Any:
    """Shapes [k, ...] on the devices of the members."""
    where = of_members.member_sharding(members)
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where), tree)
