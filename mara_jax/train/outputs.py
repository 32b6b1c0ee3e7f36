"""What a run writes while it trains: opened before its first step, closed after its last."""

import pathlib
from typing import NamedTuple

from mara_jax.parallel import hosts
from mara_jax.train import guard, metrics, mode_ledger, rollouts
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.held_out import Evaluations
from mara_jax.train.setup import Setup
from mara_jax.train.step_log import StepLog
from mara_jax.train.trackers import Trackers


class Outputs(NamedTuple):
    """log: the rows and completions of steps; file: metrics.jsonl, which it writes; and what else a run keeps."""

    log: StepLog
    file: metrics.Log
    evaluations: Evaluations
    checkpoints: Checkpoints
    trackers: Trackers

    def close(self) -> None:
        """Waits for checkpoints under way, and closes every file."""
        self.checkpoints.close()
        self.file.close()
        self.evaluations.close()
        self.trackers.close()


def opened(
    setup: Setup, steps_done: int, checkpoints: Checkpoints, workdir: pathlib.Path, display: metrics.Display
) -> Outputs:
    """The outputs of a run, cut back to what belongs to its first `steps_done` steps."""
    cfg, keeps = setup.cfg, hosts.is_process_zero()
    file = metrics.Log(workdir / "metrics.jsonl", steps_done, keeps)
    for warning in file.warnings():
        display.note(warning)
    completions = rollouts.Rollouts(workdir, setup.task, steps_done, keeps and cfg.rollout.save)
    if completions.lost:
        steps = metrics.first_of(completions.lost)
        display.note(f"WARNING: {completions.folder} has no whole file of steps {steps}: what reads it lacks them")
    watch = guard.Guard(setup, workdir, file.rows, checkpoints)
    tracked = hosts.raise_on_all_processes(lambda: Trackers(cfg, workdir, steps_done, display, keeps))
    ledger = mode_ledger.ModeLedger(setup, workdir / mode_ledger.FILE, file.rows, keeps)
    log = StepLog(setup, file, completions, display, watch, tracked, ledger)
    evaluations = Evaluations(setup, workdir, steps_done, checkpoints, display, tracked)
    return Outputs(log, file, evaluations, checkpoints, tracked)
