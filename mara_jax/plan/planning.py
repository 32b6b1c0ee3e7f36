"""The plan of a run for devices that need not be present: memory, work, collectives, and the batch that would fit."""

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax import config
from mara_jax.parallel import mesh, sharding
from mara_jax.plan import abstract, chips, hlo, prompts, suggest
from mara_jax.plan.chips import GIB, Chip
from mara_jax.policies import lora, parameters
from mara_jax.policies.parameters import Architecture
from mara_jax.train import capacity, preflight, shape


class Memory(NamedTuple):
    """Bytes on one device at the peak of a phase.

    parameters: of the policy; reference: of the reference policy; optimiser: its moments; cache: the KV cache of the
    completions; batch: other arguments and results of the phase; temporaries: all else that the compiler allocates.
    """

    parameters: int
    reference: int
    optimiser: int
    cache: int
    batch: int
    temporaries: int

    @property
    def total(self) -> int:
        return sum(self)


class Phase(NamedTuple):
    """What one phase of a step takes on one device.

    source: how its memory is known, in words; flops: the device's share of the program's matmuls; bytes: the least that
    it must move through its memory; floor: the least seconds by each bound, "compute", "memory" and "links".
    """

    memory: Memory
    source: str
    flops: float
    bytes: float
    floor: dict[str, float]
    collectives: list[hlo.Collective]


def phases(
    run: config.LanguageRun,
    arch: Architecture,
    sizes: abstract.Sizes,
    chip: Chip,
    on_compile: Callable[[str], None] = lambda _: None,
) -> dict[str, Phase]:
    """Every phase, compiled for the devices of the layout in use.

    Args:
      on_compile: called with the name of each phase before it is compiled, since that takes minutes.
    """
    compiled = {}
    for name, program in abstract.phase_programs(run, arch, sizes).items():
        on_compile(name)
        compiled[name] = _phase(name, program, run, arch, sizes, chip)
    return compiled


def _phase(
    name: str, program: abstract.PhaseProgram, run, arch: Architecture, sizes: abstract.Sizes, chip: Chip
) -> Phase:
    held, batch = capacity.held(run, arch), capacity.bytes_of(program.batch)
    cache = held.cache if name == "rollout" else 0
    memory = Memory(*held[:3], cache, batch, 0)
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
    flops = program.flops() / _devices()
    moved = least_bytes(name, arch, sizes)
    sent = sum(collective.sent for collective in collectives)
    return Phase(memory, source, flops, moved, floor(chip, arch.compute_dtype, flops, moved, sent), collectives)


def _devices() -> int:
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
        "rollout": known.optimiser + (0 if adapted else known.reference),
        "reference": known.parameters + known.optimiser,
        "update": 0,
    }[name]
    remaining = size - known.cache if temporaries else size + beside - known.total
    return known._replace(temporaries=max(0, remaining))


def least_bytes(name: str, arch: Architecture, sizes: abstract.Sizes) -> float:
    """The least that a device must read and write in its memory, with the mesh of the layout in use.

    A rollout reads every kernel in the compute dtype at each decoded token and the keys and values seen so far; the
    reference's pass reads kernels once, an update twice; an update then reads and writes what is trained and moments.
    """
    width = jnp.dtype(arch.compute_dtype).itemsize
    count, trained, tensor = parameters.count(arch), lora.count(arch), sharding.shard_count("mlp")
    kernels = count * width / tensor
    if name == "reference":
        return kernels
    if name == "update":
        return 2 * kernels + 6 * 4 * trained / (tensor * sharding.shard_count("embed"))
    steps = sizes.steps
    slot = 2 * arch.layers * arch.kv_heads * arch.head_dim * width / sharding.shard_count("kv_heads")
    rows = sizes.rows / sharding.shard_count("rows")
    prompts = sizes.prompts * sizes.prompt_tokens / min(sizes.prompts, sharding.shard_count("rows"))
    return (steps + 1) * kernels + steps * slot * (prompts + rows * sizes.new_tokens / 2)


def floor(chip: Chip, dtype: str, flops: float, moved: float, sent: float) -> dict[str, float]:
    """Least seconds by each of the chip's peaks; empty where they are not known.

    Args:
      flops, moved, sent: of one device: FLOPs, bytes through its memory, bytes to other devices.
    """
    if dtype not in chip.flops:
        return {}
    return {"compute": flops / chip.flops[dtype], "memory": moved / chip.bandwidth, "links": sent / chip.links}


def largest(fits: Callable[[int], bool], first: int, most: int, guess: int | None = None) -> tuple[int, int | None]:
    """The largest number of units up to `most` that fits, if more units never need less.

    Args:
      fits: whether a number of units fits; called few times, since each call may compile a program.
      first: the number to start from, at least 1.
      guess: an estimate of the result; it and the number after it are tried first.

    Returns:
      (largest that fits, 0 where none does; smallest that does not, None where all do): neighbours.
    """
    low, high, gap = 0, most + 1, 1 if guess is not None else max(1, first)
    hints = [] if guess is None else [min(max(1, guess), most), min(max(1, guess), most) + 1]
    while high - low > 1:
        hints = [hint for hint in hints if low < hint < high]
        if hints:
            at = hints.pop(0)
        elif high > most:
            at, gap = min(most, low + gap), 2 * gap
        else:
            at, gap = max((low + high) // 2, high - gap), 2 * gap
        low, high = (at, high) if fits(at) else (low, at)
    return low, high if high <= most else None


def extrapolated(smaller: tuple[int, float], larger: tuple[int, float], limit: float) -> int:
    """The number of units at which a straight line through two measurements (units, bytes) reaches a limit."""
    slope = (larger[1] - smaller[1]) / (larger[0] - smaller[0])
    if slope <= 0:
        return 2**31
    return max(0, smaller[0] + math.floor((limit - smaller[1]) / slope))


def with_batch(run: config.LanguageRun, prompts: int) -> config.LanguageRun:
    """The run with another number of groups."""
    return dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, prompts_per_step=prompts))


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def plan(
    run: config.LanguageRun,
    topology: chips.Topology,
    prompt_tokens: int | None = None,
    suggested: bool = False,
    search: bool = False,
) -> dict[str, Any]:
    """Everything `python -m mara_jax.plan` reports of a run.

    Args:
      prompt_tokens: length of the longest prompt; if None, read from the task and its tokenizer.
      suggested: plan for the suggested mesh rather than the run's.
      search: also find the largest batch that fits.

    Raises:
      ValueError: a policy of unknown shape, a mesh that cannot be, a topology that nothing here compiles for.
    """
    arch = shape.run_architecture(run)
    devices, chip = chips.devices(topology), chips.chip_of(topology)
    sizes = abstract.sizes_of(run, prompts.longest(run) if prompt_tokens is None else prompt_tokens)
    with sharding.use(sharding.layout(mesh.make_mesh({"data": len(devices), "fsdp": 1, "tensor": 1}, devices))):
        advice = suggest.best(run, arch, sizes, chip, len(devices))
    if suggested and advice is not None:
        run = suggest.with_mesh(run, advice)
    layout = preflight.layout_of(run, devices)
    with sharding.use(layout):
        phase_of = phases(run, arch, sizes, chip, report_compilation)
    record = _record(run, arch, sizes, topology, chip, layout, phase_of)
    record["suggested_mesh"] = None if advice is None else advice._asdict() | {"flags": advice.flags}
    if search:
        record["largest_batch"] = largest_batch(run, arch, sizes, chip, layout, record["peak_bytes"])
    record["verdict"] = verdict(record)
    return record


def report_compilation(name: str) -> None:
    """Writes to stderr which phase is being compiled."""
    print(f"compiling {name} ...", file=sys.stderr, flush=True)


def _record(run, arch, sizes, topology, chip: Chip, layout, phase_of: dict[str, Phase]) -> dict[str, Any]:
    peak = max(phase.memory.total for phase in phase_of.values())
    return {
        "policy": run.policy.weights,
        "dtype": arch.compute_dtype,
        "remat": arch.remat,
        "topology": topology.name,
        "devices": topology.count,
        "chip": dataclasses.asdict(chip),
        "mesh": dict(layout.mesh.shape),
        "shape": sizes._asdict() | {"parameters": parameters.count(arch)},
        "phases": {name: _row(phase) for name, phase in phase_of.items()},
        "peak_bytes": peak,
        "fits": peak <= chip.memory,
    }


def _row(phase: Phase) -> dict[str, Any]:
    return {
        "memory": phase.memory._asdict() | {"total": phase.memory.total},
        "told": phase.source,
        "flops": phase.flops,
        "bytes_least": phase.bytes,
        "sent": sum(collective.sent for collective in phase.collectives),
        "floor_s": phase.floor,
        "collectives": [collective._asdict() for collective in phase.collectives],
    }


def largest_batch(run, arch, sizes: abstract.Sizes, chip: Chip, layout, peak: int) -> dict[str, Any]:
    """The most groups that fit, measured by compiling; only multiples of what the mesh divides are tried."""
    step = _least_groups(run, layout)
    first = max(1, sizes.prompts // step)
    known = {first: peak} if first * step == sizes.prompts else {}

    def bytes_of(units: int) -> int:
        if units not in known:
            more = with_batch(run, units * step)
            with sharding.use(layout):
                wider = sizes._replace(prompts=units * step)
                known[units] = max(
                    phase.memory.total for phase in phases(more, arch, wider, chip, report_compilation).values()
                )
        return known[units]

    second = 2 * first
    guess = extrapolated((first, bytes_of(first)), (second, bytes_of(second)), chip.memory)
    most = max(1, 2**20 // (step * sizes.group))
    fits, fails = largest(lambda units: bytes_of(units) <= chip.memory, first, most, guess)
    return {
        "groups": fits * step,
        "samples": fits * step * sizes.group,
        "too_many_groups": None if fails is None else fails * step,
        "compiled": {units * step: size for units, size in sorted(known.items())},
    }


def _least_groups(run: config.LanguageRun, layout: sharding.Layout) -> int:
    """The least number of groups that the mesh divides; it divides every multiple, too."""
    samples = run.rollout.group_size // run.optimiser.micro_batches
    for groups in range(1, layout.mesh.size + 1):
        try:
            sharding.row_axes(layout, groups, samples)
            return groups
        except ValueError:
            continue
    return layout.mesh.size


def verdict(record: dict[str, Any]) -> str:
    """In words: whether it fits, how much does, and which mesh to use."""
    chip, fullest = record["chip"], max(record["phases"].items(), key=lambda item: item[1]["memory"]["total"])
    words = "fits" if record["fits"] else "does not fit"
    text = f"It {words}: the {fullest[0]} needs {gib(record['peak_bytes'])} on a device that has {gib(chip['memory'])}."
    if "largest_batch" in record:
        most = record["largest_batch"]
        text += f" The largest batch that fits: {most['groups']} groups of {record['shape']['group']}."
    advice = record["suggested_mesh"]
    if advice is None:
        return text + " No mesh of so many devices divides its rows."
    same = all(record["mesh"][axis] == advice[axis] for axis in mesh.AXES)
    return text + (" The mesh is the suggested one." if same else f" Suggested mesh: {advice['flags']}")
