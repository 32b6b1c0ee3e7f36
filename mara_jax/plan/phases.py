"""What each phase of a step takes on one device: memory, work and collectives, from its compiled program."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax import config
from mara_jax.parallel import sharding
from mara_jax.plan import abstract, hlo, population
from mara_jax.plan.chips import Chip
from mara_jax.policies import lora, parameters
from mara_jax.policies.parameters import Architecture
from mara_jax.train import capacity


class Memory(NamedTuple):
    """Bytes on one device at the peak of a phase.

    parameters: of the policy; reference: of the reference policy; optimiser: its moments; reward_model: its parameters;
    cache: the KV cache of the completions; batch: other arguments and results of the phase; temporaries: all else that
    the compiler allocates.
    """

    parameters: int
    reference: int
    optimiser: int
    reward_model: int
    cache: int
    batch: int
    temporaries: int

    @property
    def total(self) -> int:
        return sum(self)


class Phase(NamedTuple):
    """What one phase of a step takes on one device.

    source: how its memory is known, in words; flops: the device's share of the matmuls; bytes: the least that it must
    move through its memory; floor: the least seconds by each bound, "compute", "memory" and "links"; calls: of its
    program in a step, all of which are counted but in the collectives and the memory.
    """

    memory: Memory
    source: str
    flops: float
    bytes: float
    floor: dict[str, float]
    collectives: list[hlo.Collective]
    calls: int = 1


def phases(
    run: config.LanguageRun,
    arch: Architecture,
    sizes: abstract.Sizes,
    chip: Chip,
    on_compile: Callable[[str], None] = lambda _: None,
    reward_arch: Architecture | None = None,
) -> dict[str, Phase]:
    """Every phase, compiled for the devices of the layout in use.

    Args:
      on_compile: called with the name of each phase before it is compiled, since that takes minutes; reward_arch: of
        the reward model, None where there is none.
    """
    programs = (population if sizes.members else abstract).phase_programs(run, arch, sizes)
    if reward_arch is not None:
        programs = {
            "rollout": programs["rollout"],
            abstract.SCORES: abstract.scores_program(reward_arch, sizes),
        } | programs
    held = (
        population.held(run, arch, sizes.members, reward_arch)
        if sizes.members
        else capacity.held(run, arch, reward_arch)
    )
    compiled = {}
    for name, program in programs.items():
        on_compile(name)
        its_arch = arch if name != abstract.SCORES or reward_arch is None else reward_arch
        compiled[name] = _phase(name, program, held, its_arch, sizes, chip)
    return compiled


def _phase(
    name: str,
    program: abstract.PhaseProgram,
    held: capacity.Held,
    arch: Architecture,
    sizes: abstract.Sizes,
    chip: Chip,
) -> Phase:
    batch = capacity.bytes_of(program.batch)
    cache = held.cache if name == "rollout" else 0
    memory = Memory(*held[:3], held.reward_model, cache, batch, 0)
    collectives: list[hlo.Collective] = []
    if held.total > chip.memory:
        source = "not compiled: what must be held has no room"
    else:
        try:
            compiled = program.program.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            memory, source = _refused(name, memory, needed, arch.lora is not None), "refused by the compiler"
        else:
            memory, source = _compiled(memory, compiled), "compiled"
            collectives = hlo.collectives(compiled.as_text(), program.trips)
    flops = program.flops() / devices()
    moved = program.calls * least_bytes(name, arch, sizes)
    sent = program.calls * sum(collective.sent for collective in collectives)
    seconds = floor(chip, arch.compute_dtype, flops, moved, sent)
    return Phase(memory, source, flops, moved, seconds, collectives, program.calls)


def devices() -> int:
    """How many devices the layout in use has."""
    layout = sharding.current()
    return 1 if layout is None else layout.mesh.size


def _compiled(known: Memory, compiled: Any) -> Memory:
    """The memory of a compiled phase: what is known of it, its results, and its temporaries.

    Arguments are counted from their shapes, since the compiler's figure leaves out those that a phase does not use
    although they stay in memory.
    """
    stats = compiled.memory_analysis()
    results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    temporaries = stats.temp_size_in_bytes
    if sharding.platform() == "tpu":
        # On a TPU the sum of all temporary allocations is up to 1.5 times what is in use at once, and the compiler
        # accepts a program whose sum exceeds the memory.
        temporaries = min(temporaries, stats.peak_memory_in_bytes - stats.argument_size_in_bytes - results)
    # The compiler's figure includes the KV cache, since it counts what a loop carries as temporary.
    spare = max(0, temporaries - known.cache)
    return known._replace(batch=known.batch + results, temporaries=spare)


# Phrases of the compilers' out-of-memory errors, and whether the number is that of the temporaries alone.
_SIZES = (
    (re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of"), False),
    (re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)"), True),
    (re.compile(r"allocating ([\d.]+)([KMGT]?)i?B? ?bytes"), False),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def needed_bytes(message: str) -> tuple[int, bool] | None:
    """Bytes that a compiler's out-of-memory error says a program needs, and whether these are its temporaries alone.

    None for any other error.
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    for pattern, temporaries in _SIZES:
        if match := pattern.search(message):
            return int(float(match[1]) * _UNITS[match[2]]), temporaries
    return None


def _refused(name: str, known: Memory, needed: tuple[int, bool], adapted: bool) -> Memory:
    """As `_compiled`, from the bytes in the compiler's error: of the temporaries, or of all that the program uses.

    adapted: the policy is the reference with an adapter, so that a rollout takes both.
    """
    size, temporaries = needed
    beside = {
        "rollout": known.optimiser + known.reward_model + (0 if adapted else known.reference),
        abstract.SCORES: known.parameters + known.optimiser + known.reference,
        "reference": known.parameters + known.optimiser + known.reward_model,
        "update": known.reward_model,
    }[name]
    remaining = size - known.cache if temporaries else size + beside - known.total
    return known._replace(temporaries=max(0, remaining))


def least_bytes(name: str, arch: Architecture, sizes: abstract.Sizes) -> float:
    """The least that a device must read and write in its memory, with the mesh of the layout in use.

    A rollout reads every kernel in the compute dtype at each decoded token and the keys and values seen so far; the
    reference's pass reads kernels once, as does each call of a reward model, an update twice; an update then reads and
    writes what is trained and moments.
    The members of a population read the reference's kernels together, and with adapters no others.
    """
    if not sizes.members or name == abstract.SCORES:
        return _least_bytes(name, arch, sizes, 1)
    members = population.on_a_device(sizes.members)
    with sharding.without_layout():
        return _least_bytes(name, arch, sizes, members)


def _least_bytes(name: str, arch: Architecture, sizes: abstract.Sizes, members: int) -> float:
    width = jnp.dtype(arch.compute_dtype).itemsize
    count, trained, tensor = parameters.count(arch), lora.count(arch), sharding.shard_count("mlp")
    reference = count * width / tensor
    kernels = reference if arch.lora is not None else members * reference
    if name in ("reference", abstract.SCORES):
        return reference
    if name == "update":
        return 2 * kernels + members * 6 * 4 * trained / (tensor * sharding.shard_count("embed"))
    steps = sizes.steps
    slot = 2 * arch.layers * arch.kv_heads * arch.head_dim * width / sharding.shard_count("kv_heads")
    rows = sizes.rows / sharding.shard_count("rows")
    prompts = sizes.prompts * sizes.prompt_tokens / min(sizes.prompts, sharding.shard_count("rows"))
    return (steps + 1) * kernels + members * steps * slot * (prompts + rows * sizes.new_tokens / 2)


def floor(chip: Chip, dtype: str, flops: float, moved: float, sent: float) -> dict[str, float]:
    """Least seconds by each of the chip's peaks; empty where they are not known.

    Args:
      flops, moved, sent: of one device: FLOPs, bytes through its memory, bytes to other devices.
    """
    if dtype not in chip.flops:
        return {}
    return {"compute": flops / chip.flops[dtype], "memory": moved / chip.bandwidth, "links": sent / chip.links}
