"""What a run does before its first step: the reference policy, its measurement, and the state to start from."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
import optax

from mara_jax import hf
from mara_jax.config import LanguageRun
from mara_jax.parallel import hosts
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Task
from mara_jax.train import adapter, metrics, optim, placement, reference, report
from mara_jax.train import workdir as workdirs
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.metrics import Display
from mara_jax.train.state import State

SAMPLES = "reference_samples.jsonl"


class Setup(NamedTuple):
    """What does not change between the steps of a run.

    prompts: token ids of each prompt of the task; log_mass [p, a]: log Z or log M of each answer under the reference
    (nats), over all prompts; log_optimum [a + 1]: log-probs of each answer, then of none, at the objective's optimum,
    None where they are not known.
    """

    cfg: LanguageRun
    task: Task
    policy: Policy
    ref_params: Any
    prompts: list[list[int]]
    log_mass: np.ndarray
    tx: optax.GradientTransformation
    log_optimum: list[float] | None = None


def prepare(cfg: LanguageRun, task: Task, workdir: pathlib.Path, display: Display) -> tuple[Setup, State, Checkpoints]:
    """Loads or warms up the reference policy, measures it, and makes or restores the state to start from.

    Writes config.json, reference/ (where there is a warm-up), reference_samples.jsonl and reference.json.

    Raises:
      ValueError: weights, an adapter or a checkpoint that cannot be used, or demonstrations that do not fit.
    """
    policy, ref_params = reference_policy(cfg, task, workdir, display)
    prompts = reference.prompt_tokens(policy, task, cfg.policy.chat)
    measured = measured_reference(cfg, policy, ref_params, task, prompts, workdir, display)
    policy = adapter.trained(cfg, policy)
    display.note(adapter.describe(policy))
    arch, tx, checkpoints = policy.architecture, optim.make(cfg.optimiser), Checkpoints(workdir, cfg.checkpoint)
    loaded_params, ref_params = ref_params, placement.reference(arch, ref_params)
    if hosts.on_process_zero(checkpoints.latest) is None:
        # Where the reference keeps rounded copies, the loaded weights are the policy's alone, and updates may overwrite
        # them; where both share the arrays, the policy needs its own.
        copy = loaded_params is ref_params
        state = placement.fresh(arch, adapter.start(cfg, policy, loaded_params), tx, copy=copy)
    else:
        del loaded_params
        state = hosts.raise_on_all_processes(lambda: checkpoints.restore(placement.abstract(arch, tx)))
        display.note(f"resuming after step {int(state.step)}")
    log_mass_pa = np.asarray(measured["log_mass"], np.float32)
    setup = Setup(cfg, task, policy, ref_params, prompts, log_mass_pa, tx, measured.get("log_optimum"))
    return setup, state, checkpoints


def reference_policy(cfg: LanguageRun, task: Task, workdir: pathlib.Path, display: Display) -> tuple[Policy, Any]:
    """The reference policy and its params: as weights name it, or warmed up once and saved under workdir."""
    saved = workdir / "reference"
    resumed = cfg.warmup.steps and hosts.on_process_zero(saved.is_dir)
    display.note(f"loading {saved if resumed else cfg.policy.weights}")

    def read() -> tuple[Policy, Any]:
        policy, params = reference.load(str(saved), cfg.policy) if resumed else reference.load_base(cfg, task)
        reference.check_context(cfg, policy, task)
        adapter.check(cfg, policy)
        if cfg.warmup.steps and not resumed:
            reference.check_demonstrations(cfg, policy, task)
        return policy, params

    policy, params = hosts.raise_on_all_processes(read)
    # Only now is anything written: bad weights leave no folder behind.
    hosts.on_process_zero(lambda: workdirs.claim(workdir, cfg))
    if resumed or not cfg.warmup.steps:
        return policy, params
    prompts = reference.prompt_tokens(policy, task, cfg.policy.chat)
    params = reference.warm_up(cfg, policy, params, task, prompts, display)
    hf.export(policy, params, str(saved))
    display.note(f"warm-up done; the reference is saved in {saved}")
    return policy, params


def measured_reference(
    cfg: LanguageRun,
    policy: Policy,
    ref_params: Any,
    task: Task,
    prompts: list[list[int]],
    workdir: pathlib.Path,
    display: Display,
) -> dict[str, Any]:
    """The contents of reference.json, measured now where an earlier start of the run has not done so."""
    path = workdir / "reference.json"
    measured = hosts.on_process_zero(lambda: _read_measured(path) if path.exists() else None)
    if measured is None:
        display.note(f"measuring the reference on {cfg.warmup.measure_samples} samples a prompt")
        samples = reference.samples_to_measure(cfg, policy, ref_params, task, prompts)
        rows, values = reference.sample_rows(samples, task.answers), reference.measure(cfg, samples, task)
        hosts.on_process_zero(lambda: metrics.write_rows(workdir / SAMPLES, rows))
        hosts.on_process_zero(lambda: workdirs.write_json(path, values))
        measured = hosts.on_process_zero(lambda: _read_measured(path))
    for line in report.start_summary(measured):
        display.note(line)
    return measured


def _read_measured(path: pathlib.Path) -> dict[str, Any]:
    """What reference.json holds, with the masses that a run needs."""
    try:
        measured = report.read_reference(path)
        if "log_mass" not in measured:
            raise ValueError(f"{path} lacks log_mass; it was not written by a language-model run")
    except ValueError as error:
        raise ValueError(f"{error}. Delete it, and the reference is measured again") from error
    return measured
