"""Checkpoints by Orbax: saved every so many steps, the newest restored."""

import gc
import json
import pathlib
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

from mara_jax.config import Checkpoint
from mara_jax.train import memory
from mara_jax.train.state import State


def check(workdir: pathlib.Path, steps: int) -> None:
    """Refuses to resume a run that is already past `steps`, or whose checkpoints are gone. Writes nothing.

    Raises:
      ValueError: naming what was done and what is asked for.
    """
    directory, written = workdir / "checkpoints", workdir / "metrics.jsonl"
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a folder: move it away, or choose another --workdir")
    saved = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    done = max(saved, default=0)
    if done > steps:
        raise ValueError(f"steps={steps}, but {workdir} has done {done}: give at least {done}, or another --workdir")
    if saved or not written.exists():
        return
    before = json.loads((workdir / "config.json").read_text())
    first = min(before["checkpoint"]["every"], before["steps"])
    rows = len(written.read_bytes().splitlines())
    if rows >= first:
        raise ValueError(
            f"{written} tells of {rows} steps, but {directory} holds no checkpoint: put it back, or choose another "
            "--workdir (training from the beginning would overwrite those steps)"
        )


class Checkpoints:
    """The checkpoints of one run, under WORKDIR/checkpoints/STEP."""

    def __init__(self, workdir: pathlib.Path, cfg: Checkpoint):
        # On a CPU a device array and its host copy may share memory, which the next update reuses: write at once.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=cfg.keep, enable_async_checkpointing=jax.default_backend() != "cpu"
        )
        self.directory = (workdir / "checkpoints").absolute()
        self.every = cfg.every
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint follows `step` steps."""
        return last or step % self.every == 0

    def save(self, step: int, state: State, last: bool = False) -> None:
        """Writes the state reached after `step` steps, if the step is due or the last."""
        if self.due(step, last) and step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.StandardSave(state), force=True)
            memory.give_back()

    def latest(self) -> int | None:
        """Steps done at the newest complete checkpoint, or None."""
        return self.manager.latest_step()

    def restore(self, state: Any) -> Any:
        """The newest checkpoint, in the shapes and placement of `state`.

        Raises:
          ValueError: it is there but cannot be read.
        """
        step, hook = self.latest(), sys.unraisablehook
        # Reads that are given up after a damaged one are coroutines and threads that raise, too, some only at the end
        # of the process: nothing but the one line below is to be said of them.
        sys.unraisablehook = lambda _: None
        try:
            restored = self.manager.restore(step, args=ocp.args.StandardRestore(state))
            sys.unraisablehook = hook
            return restored
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
            reason = " ".join(str(error).split())[:160]
        gc.collect()
        others = [s for s in self.manager.all_steps() if s != step]
        then = f"resume from step {max(others)}" if others else "start again"
        raise ValueError(
            f"checkpoint {self.directory / str(step)} cannot be read ({reason}): delete that folder to {then}"
        )

    def close(self) -> None:
        """Waits for writes under way."""
        self.manager.wait_until_finished()
        self.manager.close()
