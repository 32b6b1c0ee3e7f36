"""The training of a population: its members' run directories, and the waves in which they are trained.

Members whose methods share a program form a wave: their parameters are stacked, and each step draws, scores and updates
all of them at once. Waves follow one another. What a member draws, and how it is trained, is that of a single run.
"""

import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from mara_jax import config
from mara_jax.config import LanguageRun
from mara_jax.parallel import stop
from mara_jax.tasks.base import Task
from mara_jax.tasks.checked import checked
from mara_jax.train import (
    adapter,
    capacity,
    checkpoint,
    inputs,
    memory,
    metrics,
    optim,
    outputs,
    programs,
    reference,
    reference_samples,
    reward_model,
    startup,
    trained,
    warnings,
)
from mara_jax.train import workdir as workdirs
from mara_jax.train.checkpoint import Checkpoints, saved_steps
from mara_jax.train.outputs import Outputs
from mara_jax.train.population import loop, report, step
from mara_jax.train.population.display import MemberDisplay
from mara_jax.train.report import read_reference, start_summary
from mara_jax.train.setup import Setup


class Member(NamedTuple):
    """A member as it is trained: its name, its setup, and its run directory."""

    name: str
    setup: Setup
    workdir: pathlib.Path


def run(cfg: LanguageRun, task: Task, workdir: pathlib.Path) -> None:
    """Trains every member from the beginning or from its newest checkpoint, to `cfg.steps`.

    Writes reference/ (where there is a warm-up) and reference_samples.jsonl, which all share, members/NAME/ of each,
    population.json, a figure, and model/ or adapter/ of the chosen member.

    Raises:
      ValueError: as of a single run.
    """
    with metrics.Display(cfg.steps) as display:
        for name, _ in config.members(cfg):
            show_damaged(workdir / report.FOLDER / name, None, display)
        loaded = startup.loaded(cfg, checked(task), workdir, display)
        count = len(loaded.task)
        if reference_samples.before_training(cfg, count):
            display.note(f"measuring the reference on {reference_samples.count(cfg, count)} samples a prompt")
            startup.samples_under(loaded, range(count))
        placed = startup.placed(loaded)
        # An adapter starts without the weights as they were read, of which training may keep rounded ones.
        start_params = loaded.ref_params if placed.policy.architecture.lora is None else None
        del loaded
        members = begun(placed, workdir)
        show_forecasts(members, display)
        moving = next(filter(None, (warnings.of_moving_threshold(one.setup.cfg) for one in members)), None)
        if moving:
            display.note(moving)
        report.write_members(workdir, [(one.name, one.setup.cfg) for one in members])
        display.note(adapter.describe(placed.policy))
        limit, devices = capacity.limit_here()
        scoring = None if task.learned_reward is None else reward_model.loaded(task.learned_reward).policy.architecture
        room = capacity.members_at_once(cfg, placed.policy.architecture, limit / devices, scoring)
        waves = waves_of(members, cfg.population.at_once or room)
        display.note(describe(waves, room))
        for number, wave in enumerate(waves, 1):
            sentence = reference.describe_run(wave[0].setup.cfg, task)
            display.note(f"wave {number} of {len(waves)}, {len(wave)} members, the first: {sentence}")
            train_wave(wave, start_params, display)
    report.show_end(workdir, display.console)


def begun(placed: Setup, workdir: pathlib.Path) -> list[Member]:
    """The members, each with its run directory: config.json, inputs.json and reference.json.

    reference_samples.jsonl is there where it is made before training; else all share that of the population.

    Raises:
      ValueError: a member's folder holds another run.
    """
    cfg, members, known = placed.cfg, [], {}
    weights = str((workdir / "reference").absolute()) if cfg.warmup.steps else inputs.pinned(workdir, cfg)
    files = inputs.of_files(cfg, weights, inputs.WEIGHTS) | inputs.of_run(cfg, placed.task, placed.policy)
    for name, one in config.members(cfg):
        own, folder = own_run(one, weights), workdir / report.FOLDER / name
        workdirs.check(folder, own, ["policy.weights"] if cfg.warmup.steps else [])  # a population may be moved
        checkpoint.check(folder, own.steps)
        workdirs.claim(folder, own)
        (folder / inputs.FILE).unlink(missing_ok=True)  # it names weights that may have been moved
        inputs.record(folder, weights, files)
        tx = known.setdefault(own.optimiser, optim.make(own.optimiser))
        setup = placed._replace(cfg=own, tx=tx)
        _measure(setup, workdir, folder)
        members.append(Member(name, setup, folder))
    return members


def show_forecasts(members: Sequence[Member], display: metrics.Display) -> None:
    """Says what is known of the reference policy, and which members' optimum is a collapse."""
    known = {member.name: read_reference(member.workdir / "reference.json") for member in members}
    lines = start_summary(next(iter(known.values()))) if known else []
    for line in lines:
        display.note(line)
    names = [name for name, one in known.items() if one["collapse"] is not None]
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        display.note(f"WARNING: the optimum is a collapse for {', '.join(names[:4])}{more}: see their reference.json")


def own_run(member: LanguageRun, weights: str) -> LanguageRun:
    """The config with which a member is a run of its own, from the reference policy that the population has made.

    At least two checkpoints stay: members are saved one after another, and a kill between them leaves some a step
    behind.
    """
    keep = dataclasses.replace(member.checkpoint, keep=max(2, member.checkpoint.keep))
    policy = dataclasses.replace(member.policy, weights=weights)
    warmup = dataclasses.replace(member.warmup, steps=0, max_steps=0)
    return dataclasses.replace(member, checkpoint=keep, policy=policy, warmup=warmup)


def _measure(setup: Setup, workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes what is known of the reference policy before training, with the member's own optimum."""
    path, store, cfg, task = folder / "reference.json", setup.ref_samples, setup.cfg, setup.task
    if path.exists() or store is None:
        return
    values = reference.unmeasured(cfg, task)
    if reference_samples.before_training(cfg, len(task)):
        shutil.copyfile(workdir / reference_samples.FILE, folder / reference_samples.FILE)
        values = reference.measure(cfg, [store.known[number] for number in range(len(task))], task)
    workdirs.write_json(path, values)


def show_damaged(folder: pathlib.Path, step: int | None, display: metrics.Display) -> bool:
    """Whether damaged checkpoints of a member have been moved away, which is shown; arguments and errors as of
    `checkpoint.set_aside_damaged`."""
    lines = checkpoint.set_aside_damaged(folder, step)
    for line in lines:
        display.note(line)
    return bool(lines)


def common_step(wave: Sequence[Member], display: metrics.Display) -> int:
    """The newest step of which every member has a whole checkpoint; 0 without one."""
    while True:
        done = max(set.intersection(*({0, *saved_steps(member.workdir)} for member in wave)))
        if not done or not any([show_damaged(member.workdir, done, display) for member in wave]):
            return done


def waves_of(members: Sequence[Member], at_once: int) -> list[list[Member]]:
    """Members whose update is one program, in parts as of `capacity.wave_sizes`."""
    alike: dict[Any, list[Member]] = {}
    for member in members:
        alike.setdefault(programs.static_algorithm(member.setup.cfg), []).append(member)
    waves = []
    for members in alike.values():
        left = iter(members)
        waves += [list(itertools.islice(left, size)) for size in capacity.wave_sizes(len(members), at_once)]
    return waves


def describe(waves: Sequence[Sequence[Member]], room: int) -> str:
    """In words, how many members are trained when."""
    members, largest = sum(map(len, waves)), max(map(len, waves))
    many = f"{len(waves)} waves, one after another, of at most {largest}" if len(waves) > 1 else "one wave"
    return f"population: {members} members in {many}; memory has room for about {room} at once"


def train_wave(wave: Sequence[Member], loaded_params: Any, display: metrics.Display) -> None:
    """Trains members side by side, from the newest step that all of them have saved, and writes their policies.

    Args:
      loaded_params: of the reference policy, as read, from which a policy without an adapter starts.
    """
    done = common_step(wave, display)
    ended = [member for member in wave if max(saved_steps(member.workdir), default=0) == member.setup.cfg.steps]
    if not done and 0 < len(ended) < len(wave):  # they were in other waves before, as with another `at_once`
        for part in (ended, [member for member in wave if member not in ended]):
            train_wave(part, loaded_params, display)
        return
    setups = [member.setup for member in wave]
    saved = [Checkpoints(member.workdir, member.setup.cfg.checkpoint) for member in wave]
    for checkpoints in saved:
        checkpoints.drop_after(done)
    if done:
        display.note(f"resuming after step {done}")
        shapes = startup.abstract_state(setups[0])
        states = (checkpoints.restore(shapes, done) for checkpoints in saved)
    else:
        states = (startup.start_state(setup, loaded_params) for setup in setups)
    state = step.stacked(states)
    del states
    memory.give_back()
    shown = [MemberDisplay(member.name, display) for member in wave]
    opened: list[Outputs] = []
    for member, checkpoints, own in zip(wave, saved, shown, strict=True):
        opened.append(outputs.opened(member.setup, done, checkpoints, member.workdir, own))
    with stop.deferred():
        try:
            state = loop.train(setups, state, done, opened, display)
        except BaseException:
            for checkpoints in saved:
                checkpoints.finish_alone()
            raise
        for one in opened:
            one.close()
        stop.check_finished(int(state.step[0]), setups[0].cfg.steps)
    for place, member in enumerate(wave):
        trained.write_end(member.setup.cfg, member.setup.policy, step.member(state.params, place), member.workdir)
