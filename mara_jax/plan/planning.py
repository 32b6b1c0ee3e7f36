"""The plan of a run for devices that need not be present: memory, work, collectives, and the batch that would fit."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

from mara_jax import config
from mara_jax.parallel import mesh, sharding
from mara_jax.plan import abstract, chips, phases, population, prompts, suggest
from mara_jax.plan.chips import GIB, Chip
from mara_jax.policies import parameters
from mara_jax.policies.parameters import Architecture
from mara_jax.train import preflight, shape


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
    arch, reward_arch = shape.run_architecture(run), shape.reward_architecture(run)
    devices, chip = chips.devices(topology), chips.chip_of(topology)
    sizes = abstract.sizes_of(run, prompts.longest(run) if prompt_tokens is None else prompt_tokens)
    if config.is_population(run):
        return plan_of_members(run, topology, arch, sizes, reward_arch)
    with sharding.use(sharding.layout(mesh.make_mesh({"data": len(devices), "fsdp": 1, "tensor": 1}, devices))):
        advice = suggest.best(run, arch, sizes, chip, len(devices), reward_arch)
    if suggested and advice is not None:
        run = suggest.with_mesh(run, advice)
    layout = preflight.layout_of(run, devices)
    with sharding.use(layout):
        phase_of = phases.phases(run, arch, sizes, chip, report_compilation, reward_arch)
    record = _record(run, arch, sizes, topology, chip, layout, phase_of, reward_arch)
    record["suggested_mesh"] = None if advice is None else advice._asdict() | {"flags": advice.flags}
    if search:
        record["largest_batch"] = largest_batch(run, arch, sizes, chip, layout, record["peak_bytes"], reward_arch)
    record["verdict"] = verdict(record)
    return record


def plan_of_members(
    run: config.LanguageRun,
    topology: chips.Topology,
    arch: Architecture,
    sizes: abstract.Sizes,
    reward_arch: Architecture | None = None,
) -> dict[str, Any]:
    """As `plan`, of a population's first wave, with the floors of as many single runs one after another (`alone_s`).

    Those are left out where the mesh does not divide a single run's rows.
    """
    devices, chip, members = chips.devices(topology), chips.chip_of(topology), config.members(run)
    layout, first = preflight.layout_of(run, devices), members[0].run
    with sharding.use(layout):
        sizes = sizes._replace(members=population.at_once(run, arch, chip.memory, reward_arch))
        phase_of = phases.phases(first, arch, sizes, chip, report_compilation, reward_arch)
        record = _record(run, arch, sizes, topology, chip, layout, phase_of, reward_arch)
        record |= {"members": len(members), "members_on_a_device": population.on_a_device(sizes.members)}
        record |= {"hosts": len({device.process_index for device in devices})}
        record |= {"suggested_mesh": None, "alone_s": None}
        with contextlib.suppress(ValueError):
            alone_s = seconds_alone(first, arch, sizes._replace(members=0), chip, reward_arch)
            record["alone_s"] = sizes.members * alone_s
    record["verdict"] = verdict_of_members(record)
    return record


def seconds_alone(
    run: config.LanguageRun,
    arch: Architecture,
    sizes: abstract.Sizes,
    chip: Chip,
    reward_arch: Architecture | None = None,
) -> float:
    """The floor of a single run's step on the devices of the layout in use, without what they send; 0: not known.

    Raises:
      ValueError: rows that the mesh does not divide.
    """
    layout, samples = sharding.current(), sizes.group // run.optimiser.micro_batches
    if layout is not None:
        sharding.row_axes(layout, sizes.prompts, samples)
    seconds = 0.0
    programs = [(name, program, arch) for name, program in abstract.phase_programs(run, arch, sizes).items()]
    if reward_arch is not None:
        programs.append((abstract.SCORES, abstract.scores_program(reward_arch, sizes), reward_arch))
    for name, program, own in programs:
        flops = program.flops() / phases.devices()
        moved = program.calls * phases.least_bytes(name, own, sizes)
        seconds += max(phases.floor(chip, own.compute_dtype, flops, moved, 0.0).values(), default=0.0)
    return seconds


def verdict_of_members(record: dict[str, Any]) -> str:
    """In words: how many members are side by side, whether they fit, and what they save."""
    count = record["shape"]["members"]
    waves = f"{count} of {record['members']} members side by side, {record['members_on_a_device']} on a device"
    text = f"{fit_in_words(record)} {waves}."
    if record["hosts"] > 1:
        text += f" These devices belong to {record['hosts']} hosts, and a population trains on those of one."
    together = sum(max(row["floor_s"].values(), default=0.0) for row in record["phases"].values())
    if record["alone_s"] and together:
        text += f" A step of them takes at least {together:.3g} s; {count} single runs, {record['alone_s']:.3g} s."
    return text


def report_compilation(name: str) -> None:
    """Writes to stderr which phase is being compiled."""
    print(f"compiling {name} ...", file=sys.stderr, flush=True)


def _record(
    run, arch, sizes, topology, chip: Chip, layout, phase_of: dict[str, phases.Phase], reward_arch: Architecture | None
) -> dict[str, Any]:
    peak = max(phase.memory.total for phase in phase_of.values())
    return {
        "policy": run.policy.weights,
        "reward_model": None if reward_arch is None else _reward_model(run, reward_arch),
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


def _reward_model(run: config.LanguageRun, arch: Architecture) -> dict[str, Any]:
    return {
        "where": getattr(run.task, "reward_model", ""),
        "parameters": parameters.count(arch),
        "dtype": arch.compute_dtype,
    }


def _row(phase: phases.Phase) -> dict[str, Any]:
    return {
        "calls": phase.calls,
        "memory": phase.memory._asdict() | {"total": phase.memory.total},
        "told": phase.source,
        "flops": phase.flops,
        "bytes_least": phase.bytes,
        "sent": phase.calls * sum(collective.sent for collective in phase.collectives),
        "floor_s": phase.floor,
        "collectives": [collective._asdict() for collective in phase.collectives],
    }


def largest_batch(
    run, arch, sizes: abstract.Sizes, chip: Chip, layout, peak: int, reward_arch: Architecture | None = None
) -> dict[str, Any]:
    """The most groups that fit, measured by compiling; only multiples of what the mesh divides are tried."""
    step = _least_groups(run, layout)
    first = max(1, sizes.prompts // step)
    known = {first: peak} if first * step == sizes.prompts else {}

    def bytes_of(units: int) -> int:
        if units not in known:
            more = with_batch(run, units * step)
            with sharding.use(layout):
                wider = sizes._replace(prompts=units * step)
                compiled = phases.phases(more, arch, wider, chip, report_compilation, reward_arch)
                known[units] = max(phase.memory.total for phase in compiled.values())
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
    text = fit_in_words(record)
    if "largest_batch" in record:
        most = record["largest_batch"]
        text += f" The largest batch that fits: {most['groups']} groups of {record['shape']['group']}."
    advice = record["suggested_mesh"]
    if advice is None:
        return text + " No mesh of so many devices divides its rows."
    same = all(record["mesh"][axis] == advice[axis] for axis in mesh.AXES)
    return text + (" The mesh is the suggested one." if same else f" Suggested mesh: {advice['flags']}")


def fit_in_words(record: dict[str, Any]) -> str:
    """Whether it fits, with the fullest phase."""
    chip, fullest = record["chip"], max(record["phases"].items(), key=lambda item: item[1]["memory"]["total"])
    words = "fits" if record["fits"] else "does not fit"
    return f"It {words}: the {fullest[0]} needs {gib(record['peak_bytes'])} on a device that has {gib(chip['memory'])}."
