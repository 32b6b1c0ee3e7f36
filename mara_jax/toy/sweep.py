"""A study of the 100-outcome problem from a config: one program, one file of numbers, one phase diagram."""

import dataclasses
import os
import pathlib
import time

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mara_jax.config import ToyRun, sweep_algorithms
from mara_jax.toy import phase_diagram, problems, study
from mara_jax.toy.single_run import choices_of
from mara_jax.train import workdir as workdirs
from mara_jax.train.metrics import Display

TWO_PEAKS = {"figure2": problems.figure2, "figure4": problems.figure4}  # as functions of the height of the left peak
RECORDED = 20  # steps at which each run's metrics are recorded


def run(cfg: ToyRun, workdir: pathlib.Path) -> None:
    """Trains every run of `cfg.sweep` and writes sweep.npz, sweep.json (its axes) and phase.png (and .svg)."""
    one_device_a_core()
    plan = plan_of(cfg)
    workdirs.claim(workdir, cfg)
    display = Display(cfg.steps)
    variants, problems, betas, thresholds, seeds = plan.shape
    display.note(
        f"{plan.runs:,} runs of {cfg.steps} steps: {variants} variants x {problems} gaps x {betas} betas x "
        f"{thresholds} thresholds x {seeds} seeds; {len(jax.devices())} devices, {cfg.sweep.chunk} runs a chunk"
    )
    started = time.perf_counter()
    with _progress(display) as bar:
        training = bar.add_task("compiling", total=plan.runs)
        trained = study.run(plan, lambda done, _: bar.update(training, completed=done, description="training"))
    display.note(f"done in {time.perf_counter() - started:.1f} s, compilation included")
    axes = axes_of(cfg, plan)
    part = workdir / "sweep.part.npz"
    np.savez_compressed(part, **trained)  # pyright: ignore[reportArgumentType]
    part.replace(workdir / "sweep.npz")
    workdirs.write_json(workdir / "sweep.json", axes)
    for line in phase_diagram.summary(trained, axes):
        display.note(line)
    display.note(f"phase diagram: {phase_diagram.diagram(workdir)}   numbers: {workdir / 'sweep.npz'}")


def one_device_a_core() -> None:
    """Makes every CPU core a jax device, over which the runs are divided; only possible before jax is initialised."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", cores)
    except RuntimeError:  # a backend is initialised already: the study uses its devices
        return


def plan_of(cfg: ToyRun) -> study.Plan:
    """The product of a config's axes."""
    name, gaps = f"figure{cfg.toy.figure}", gaps_of(cfg)
    every = next(n for n in range(max(1, cfg.steps // RECORDED), cfg.steps + 1) if cfg.steps % n == 0)
    return study.Plan(
        variants=tuple(
            choices_of(dataclasses.replace(cfg, algorithm=algorithm), every) for algorithm in sweep_algorithms(cfg)
        ),
        problems=tuple(TWO_PEAKS[name](1 - gap) for gap in gaps) if gaps else (problems.PROBLEMS[name](),),
        betas=tuple(sorted(set(cfg.sweep.betas))),
        thresholds=cfg.sweep.thresholds or (cfg.algorithm.threshold,),
        seeds=tuple(range(cfg.seed, cfg.seed + cfg.sweep.seeds)),
        learning_rate=cfg.toy.learning_rate,
        chunk=cfg.sweep.chunk,
    )


def gaps_of(cfg: ToyRun) -> tuple[float, ...]:
    """The reward gaps in order, each once."""
    return tuple(sorted(set(cfg.sweep.gaps)))


def axes_of(cfg: ToyRun, plan: study.Plan) -> dict:
    """Names and values along each axis of the arrays, and the reference and rewards of each problem."""
    return {
        "variants": [
            {"method": algorithm.method, "kl": algorithm.kl, "estimator": algorithm.estimator}
            for algorithm in sweep_algorithms(cfg)
        ],
        "problem": plan.problems[0].name,
        "gaps": list(gaps_of(cfg)),
        "betas": list(plan.betas),
        "thresholds": list(plan.thresholds),
        "seeds": list(plan.seeds),
        "steps": cfg.steps,
        "ref_logp": [problem.ref_logp.tolist() for problem in plan.problems],
        "reward": [problem.reward.tolist() for problem in plan.problems],
    }


def _progress(display: Display) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=display.console, transient=True, disable=not display.console.is_terminal)
