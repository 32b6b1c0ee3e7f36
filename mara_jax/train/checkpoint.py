"""Checkpoints by Orbax: saved every so many steps, the newest restored."""

import contextlib
import dataclasses
import gc
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from mara_jax.config import Checkpoint
from mara_jax.parallel import hosts
from mara_jax.train import best_checkpoint
from mara_jax.train import workdir as workdirs
from mara_jax.train.best_checkpoint import Choice, Score
from mara_jax.train.state import State

SAVED = "saved.json"  # in WORKDIR: the step of a checkpoint that was complete, so that its loss is noticed
_PARTS = ("_CHECKPOINT_METADATA", "default/_METADATA", "default/manifest.ocdbt")  # of every complete checkpoint


def check(workdir: pathlib.Path, steps: int) -> None:
    """Refuses to resume a run that is already past `steps`, or whose checkpoints are damaged or gone. Writes nothing.

    A run that ended before its first checkpoint was complete begins again.

    Raises:
      ValueError: naming what was done and what is asked for.
    """
    directory, written = workdir / "checkpoints", workdir / "metrics.jsonl"
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a folder: move it away, or choose another --workdir")
    saved = saved_steps(workdir)
    done = max(saved, default=0)
    if done > steps:
        raise ValueError(f"steps={steps}, but {workdir} has done {done}: give at least {done}, or another --workdir")
    if saved:
        newest = directory / str(done)
        lost = [name for name in _PARTS if not (newest / name).is_file()]
        if lost:
            raise _unreadable(newest, f"it lacks {lost[0]}")
        return
    rows = len(written.read_bytes().splitlines()) if written.exists() else 0
    if rows and _told_of_a_checkpoint(workdir, rows):
        raise ValueError(
            f"{written} tells of {rows} steps, but {directory} holds no checkpoint: put it back, or choose another "
            f"--workdir (to train from the beginning in place of those steps, delete {written})"
        )


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps at which there are checkpoints, in order; those whose writing was cut short have other names."""
    folders = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(int(path.name) for path in folders)


def step_to_read(workdir: pathlib.Path, step: int | None) -> int:
    """The step whose checkpoint is asked for, or the newest one's.

    Raises:
      ValueError: there is no such checkpoint.
    """
    saved = saved_steps(workdir)
    if not saved:
        raise ValueError(f"{workdir} holds no checkpoint yet: wait for the first, or name another --workdir")
    if step is None:
        return saved[-1]
    if step not in saved:
        raise ValueError(f"{workdir} holds no checkpoint of step {step}: it has {', '.join(map(str, saved))}")
    return step


def read_params(workdir: pathlib.Path, step: int, shapes: Any) -> Any:
    """The trained parameters of a checkpoint, without the optimiser's state.

    Args:
      shapes: a tree of them, as `State.params`.

    Raises:
      ValueError: it cannot be read.
    """
    folder, wanted = (workdir / "checkpoints" / str(step)).absolute(), {"params": shapes}
    args = ocp.args.PyTreeRestore(
        item=wanted, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
    )
    try:
        with _one_error(), ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "default", args=args)["params"]
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
        reason = " ".join(str(error).split())[:160]
    raise _unreadable(folder, reason)


def _told_of_a_checkpoint(workdir: pathlib.Path, rows: int) -> bool:
    if (workdir / "inputs.json").exists():
        return (workdir / SAVED).exists()
    # Versions before inputs.json did not say.
    before = json.loads((workdir / "config.json").read_text())
    return rows >= min(before["checkpoint"]["every"], before["steps"])


def _unreadable(folder: pathlib.Path, reason: str) -> ValueError:
    earlier = [step for step in saved_steps(folder.parents[1]) if step < int(folder.name)]
    complete = [s for s in earlier if all((folder.parent / str(s) / name).is_file() for name in _PARTS)]
    if complete:
        cure = f"delete that folder to resume from step {max(complete)}"
    else:
        cure = f"delete that folder and {folder.parents[1] / 'metrics.jsonl'} to start again"
    return ValueError(f"checkpoint {folder} cannot be read ({reason}): {cure}")


@dataclasses.dataclass
class NewestAndBest:
    """Which checkpoints Orbax keeps: the newest `keep`, and the best by `scores`, which grow as the run goes on."""

    keep: int
    scores: Mapping[int, Score]
    choice: Choice = best_checkpoint.highest

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, in the order of their steps, whether it stays."""
        del context
        steps = [one.step for one in checkpoints]
        kept = {*steps[-self.keep :], self.choice(steps, self.scores)}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run, under WORKDIR/checkpoints/STEP."""

    def __init__(self, workdir: pathlib.Path, cfg: Checkpoint):
        # On a CPU a device array and its host copy may share memory, which the next update reuses: write at once.
        self.asynchronous = jax.default_backend() != "cpu"
        # By steps, what `cfg.best` compares of the evaluation after them; the same on every process.
        self.scores: dict[int, Score] = {}
        policy = NewestAndBest(cfg.keep, self.scores, best_checkpoint.chosen_by(cfg.best))
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, enable_async_checkpointing=self.asynchronous)
        self.workdir = workdir
        self.directory = (workdir / "checkpoints").absolute()
        self.every = cfg.every
        hosts.on_process_zero(self._remove_unfinished)
        self.manager = ocp.CheckpointManager(self.directory, options=options)
        latest = self.manager.latest_step()
        hosts.on_process_zero(lambda: self._record(latest))

    def due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint follows `step` steps."""
        return last or step % self.every == 0

    def save(self, step: int, state: State, last: bool = False) -> bool:
        """Writes the state reached after `step` steps, if the step is due or the last; returns whether it has.

        What writing leaves behind, `memory.give_back` returns to the system.

        Raises:
          Exception: of many kinds; what was begun is removed where nobody else writes it.
        """
        if not self.due(step, last) or step in self.manager.all_steps():
            return False
        begun = self.manager.latest_step()
        try:
            with _one_error(lasting=self.asynchronous):
                self.manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception:
            if not hosts.several_processes():
                self._remove_unfinished()
            raise
        # Orbax finishes one checkpoint before it begins the next.
        if hosts.is_process_zero():
            self._record(begun if self.asynchronous else step)
        return True

    def latest(self) -> int | None:
        """Steps done at the newest complete checkpoint, or None."""
        return self.manager.latest_step()

    def drop_after(self, step: int) -> None:
        """Removes checkpoints behind a step from which a run goes on although later ones are there."""
        for later in [one for one in self.manager.all_steps() if one > step]:
            self.manager.delete(later)
        if hosts.is_process_zero():
            self._record(self.latest())

    def restore(self, state: Any, step: int | None = None) -> Any:
        """The newest checkpoint, or that of a step, in the shapes and placement of `state`.

        Raises:
          ValueError: it is there but cannot be read.
        """
        step = self.latest() if step is None else step
        try:
            with _one_error():
                return self.manager.restore(step, args=ocp.args.StandardRestore(state))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
            reason = " ".join(str(error).split())[:160]
        gc.collect()
        raise _unreadable(self.directory / str(step), reason)

    def close(self) -> None:
        """Waits for writes under way."""
        self.manager.wait_until_finished()
        if hosts.is_process_zero():
            self._record(self.latest())
        self.manager.close()

    def finish_alone(self) -> None:
        """Waits for a write under way before the run ends by an error, so that nobody starts there meanwhile.

        Not with several processes, which might wait for each other.
        """
        if not hosts.several_processes():
            with contextlib.suppress(Exception):
                self.manager.wait_until_finished()

    def _record(self, complete: int | None) -> None:
        """Says in saved.json which checkpoint is complete, if any is."""
        path = self.workdir / SAVED
        if complete is None:
            path.unlink(missing_ok=True)
        else:
            workdirs.write_json(path, {"step": complete})

    def _remove_unfinished(self) -> None:
        """Removes what Orbax renames only when it is complete: a kill or a full disk leaves gigabytes of it."""
        for _ in range(20):
            parts = [*self.directory.glob("*.orbax-checkpoint-tmp*")]
            for path in parts:
                shutil.rmtree(path, ignore_errors=True)
            if not parts:
                break
            time.sleep(0.05)  # threads of a write that failed may still add files


@contextlib.contextmanager
def _one_error(lasting: bool = False) -> Iterator[None]:
    """Lets Orbax's error speak alone.

    Reads and writes that are given up after a failed one are coroutines and threads that raise, too, some only at the
    end of the process.

    Args:
      lasting: for what goes on after the block.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    yield
    if not lasting:
        sys.unraisablehook = hook
