"""What a run does before its first step: the reference policy, its measurement, and the state to start from."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mara_jax import hf
from mara_jax.config import LanguageRun
from mara_jax.parallel import hosts
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Task
from mara_jax.train import (
    adapter,
    answer_classes,
    held_out,
    host_state,
    inputs,
    optim,
    placement,
    reference,
    reference_samples,
    report,
    reward_model,
    warnings,
    watchdog,
)
from mara_jax.train import workdir as workdirs
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.known_strings import KnownStrings
from mara_jax.train.metrics import Display
from mara_jax.train.prompts import EncodedPrompts, endings, refuse_long
from mara_jax.train.reference_samples import PromptSamples, ReferenceSamples
from mara_jax.train.replay import Replay
from mara_jax.train.setup import HeldOut, Setup
from mara_jax.train.state import State, remembered


def prepare(cfg: LanguageRun, task: Task, workdir: pathlib.Path, display: Display) -> tuple[Setup, State, Checkpoints]:
    """Loads or warms up the reference policy, measures it, and makes or restores the state to start from.

    Writes config.json, inputs.json, reference/ (where there is a warm-up), reference_samples.jsonl, reference.json and,
    where answers have classes, answer_classes.jsonl.

    Raises:
      ValueError: weights, an adapter or a checkpoint that cannot be used, or demonstrations that do not fit.
    """
    display.note(f"objective: {reference.describe_run(cfg, task)}")
    setup = loaded(cfg, task, workdir, display)
    measure(setup, workdir, display)
    moving = warnings.of_moving_threshold(cfg)
    if moving:
        display.note(moving)
    checkpoints = Checkpoints(workdir, cfg.checkpoint)
    if hosts.on_process_zero(checkpoints.latest) is None:
        setup, state = fresh(setup)
    else:
        setup = placed(setup)
        state = hosts.raise_on_all_processes(lambda: checkpoints.restore(abstract_state(setup)))
        host_state.restore(setup, workdir, int(state.step))
        display.note(f"resuming after step {int(state.step)}")
    if setup.classes is not None:
        setup.classes.restore(int(state.step), setup.ref_samples.known if setup.ref_samples else {})
    display.note(adapter.describe(setup.policy))
    return setup, state, checkpoints


def loaded(cfg: LanguageRun, task: Task, workdir: pathlib.Path, display: Display) -> Setup:
    """The setup of a run around its reference policy, as loaded or warmed up.

    Writes config.json, inputs.json and reference/ (where there is a warm-up); errors as of `prepare`.
    """
    evaluated = hosts.raise_on_all_processes(lambda: held_out.make_task(cfg, task))
    inputs.refuse_other_files(cfg, task, evaluated)
    learned = task.learned_reward
    if learned is not None:
        hosts.raise_on_all_processes(lambda: reward_model.loaded(learned))
        display.note(f"rewards are scored by the reward model {learned.where}")
    policy, ref_params = reference_policy(cfg, task, workdir, display, evaluated)
    prompts = EncodedPrompts(cfg, policy, task)
    count = reference_samples.count(cfg, len(task))
    ref_samples = ReferenceSamples(workdir / reference_samples.FILE, count, cfg.rollout.prompts_per_step)
    classes = answer_classes.opened(cfg, task, workdir / answer_classes.FILE)
    setup = Setup(cfg, task, policy, ref_params, prompts, optim.make(cfg.optimiser), ref_samples, classes=classes)
    setup = setup._replace(known_strings=known_strings(setup), replay=replay(cfg))
    del ref_params  # those that were loaded go where training keeps rounded ones
    if evaluated is not None:
        setup = setup._replace(held_out=HeldOut(evaluated, held_out.encoded(cfg, policy, evaluated)))
        for line in hosts.on_process_zero(lambda: held_out.describe(cfg, task, evaluated)):
            display.note(line)
    return setup


def known_strings(setup: Setup) -> KnownStrings | None:
    """An empty store of strings, where the method reads masses of answers and the task lists their strings."""
    needed = setup.task.lists_strings and reference_samples.reads_masses(setup.cfg.algorithm)
    return KnownStrings(setup.cfg.algorithm) if needed else None


def replay(cfg: LanguageRun) -> Replay | None:
    """An empty memory of completions, where any are replayed."""
    return Replay(cfg.rollout.replay, cfg.rollout.replay_best, cfg.seed) if cfg.rollout.replay else None


def fresh(setup: Setup) -> tuple[Setup, State]:
    """The setup of training, whose policy may have an adapter, and the state before the first step."""
    trained = placed(setup)
    # Where the reference keeps rounded copies, the loaded weights are the policy's alone, and updates may overwrite
    # them; where both share the arrays, the policy needs its own.
    return trained, start_state(trained, setup.ref_params, copy=setup.ref_params is trained.ref_params)


def start_state(setup: Setup, loaded_params: Any, copy: bool = True) -> State:
    """The state before the first step; setup: as from `placed`; copy: whether others keep the loaded parameters."""
    arch = setup.policy.architecture
    start = adapter.start(setup.cfg, setup.policy, loaded_params)
    return placement.fresh(arch, start, setup.tx, copy, remembered(setup.cfg, len(setup.task)))


def abstract_state(setup: Setup) -> State:
    """Shapes of a run's state; setup: as from `placed`."""
    return placement.abstract(setup.policy.architecture, setup.tx, remembered(setup.cfg, len(setup.task)))


def placed(setup: Setup) -> Setup:
    """The setup of training: the policy with its adapter, if any; the reference as training keeps it."""
    policy = adapter.trained(setup.cfg, setup.policy)
    return setup._replace(policy=policy, ref_params=placement.reference(policy.architecture, setup.ref_params))


def reference_policy(
    cfg: LanguageRun, task: Task, workdir: pathlib.Path, display: Display, evaluated: Task | None = None
) -> tuple[Policy, Any]:
    """The reference policy and its params: as weights name it, or warmed up once and saved under workdir.

    evaluated: the task of evaluations, if any are made.
    """
    saved = workdir / "reference"
    resumed = bool(cfg.warmup.steps and hosts.on_process_zero(saved.is_dir))
    weights = str(saved) if resumed else hosts.on_process_zero(lambda: inputs.pinned(workdir, cfg))
    display.note(f"loading {weights}")
    watchdog.entered(f"loading of {weights}")
    group = inputs.REFERENCE if resumed else inputs.WEIGHTS
    files = hosts.on_process_zero(lambda: inputs.of_files(cfg, weights, group))
    hosts.on_process_zero(lambda: inputs.check(workdir, files))  # sooner than other weights could be loaded

    def read() -> tuple[Policy, Any]:
        loaded = dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, weights=weights))
        policy, params = reference.load_base(loaded, task)
        prompts = EncodedPrompts(cfg, policy, task)
        refuse_long(cfg, prompts)
        if evaluated is not None:
            held_out.encoded(cfg, policy, evaluated)
        adapter.check(cfg, policy)
        if cfg.warmup.steps and not resumed:
            reference.check_demonstrations(cfg, policy, task)
        return policy, params

    policy, params = hosts.raise_on_all_processes(read)
    display.note(endings(policy, cfg.policy.chat))

    def claim() -> list[str]:
        begun_with = files | inputs.of_run(cfg, task, policy, evaluated)
        notes = inputs.check(workdir, begun_with)
        workdirs.claim(workdir, cfg)
        inputs.record(workdir, cfg.policy.weights if resumed else weights, begun_with)
        return notes

    # Only now is anything written: bad weights leave no folder behind.
    for line in hosts.on_process_zero(claim):
        display.note(line)
    if resumed or not cfg.warmup.steps:
        return policy, params
    params = reference.warm_up(cfg, policy, params, task, display)
    hf.export(policy, params, str(saved))
    written = hosts.on_process_zero(lambda: inputs.of_files(cfg, str(saved), inputs.REFERENCE))
    hosts.on_process_zero(lambda: inputs.record(workdir, cfg.policy.weights, written))
    display.note(f"warm-up done; the reference is saved in {saved}")
    return policy, params


def samples_under(setup: Setup, ids: Sequence[int] | np.ndarray) -> list[PromptSamples]:
    """Samples of the reference policy under each of these prompts, drawn now where none has asked for them before."""
    store = setup.ref_samples
    assert store is not None, "a run whose method reads samples of the reference has a store of them"

    def draw(ids: np.ndarray) -> list[PromptSamples]:
        return reference.draw_samples(setup, ids, "measure", store.count)

    return store.of(ids, draw)


def measure(setup: Setup, workdir: pathlib.Path, display: Display) -> None:
    """Measures the reference under every prompt where there are few, writes reference.json, and shows what it says."""
    path, count = workdir / "reference.json", len(setup.task)
    if not hosts.on_process_zero(path.exists):
        if reference_samples.before_training(setup.cfg, count) and not setup.task.keeps_state:
            display.note(f"measuring the reference on {reference_samples.count(setup.cfg, count)} samples a prompt")
            values = reference.measure(setup.cfg, samples_under(setup, range(count)), setup.task)
        else:
            values = reference.unmeasured(setup.cfg, setup.task)
        hosts.on_process_zero(lambda: workdirs.write_json(path, values))
    try:
        known = hosts.on_process_zero(lambda: report.read_reference(path))
    except ValueError as error:
        raise ValueError(f"{error}. Delete it, and the reference is measured again") from error
    for line in report.start_summary(known):
        display.note(line)
    if setup.classes is not None and setup.ref_samples is not None:
        line = warnings.of_lone_answers(setup.cfg, setup.ref_samples.known.values())
        if line:
            display.note(line)
