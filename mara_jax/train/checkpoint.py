"""Checkpoints by Orbax: saved every so many steps, the newest restored whose files are as they were written."""

import contextlib
import dataclasses
import gc
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp

from mara_jax.config import Checkpoint
from mara_jax.parallel import hosts
from mara_jax.train import best_checkpoint, event_loops, host_state, integrity
from mara_jax.train import workdir as workdirs
from mara_jax.train.best_checkpoint import Choice, Score
from mara_jax.train.state import State

SAVED = "saved.json"  # in WORKDIR: the step of a checkpoint that was complete, so that its loss is noticed
_LOOK = 0.1  # seconds between looks whether a write has ended
DAMAGED = "damaged"  # in WORKDIR: where checkpoints are moved whose files are not what was written


def check(workdir: pathlib.Path, steps: int) -> None:
    """Refuses to resume a run that is already past `steps`, or whose checkpoints are gone. Writes nothing.

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
        return
    rows = len(written.read_bytes().splitlines()) if written.exists() else 0
    if rows and _told_of_a_checkpoint(workdir, rows):
        raise ValueError(
            f"{written} tells of {rows} steps, but {directory} holds no checkpoint: put it back, or choose another "
            f"--workdir (to train from the beginning in place of those steps, delete {written})"
        )


def set_aside_damaged(workdir: pathlib.Path, step: int | None = None) -> list[str]:
    """Moves damaged checkpoints to WORKDIR/damaged, so that the run goes on from the newest whole one.

    Args:
      step: of the checkpoint from which it would go on; by default the newest.

    Returns:
      A line to show for each.

    Raises:
      ValueError: it is damaged, and so are all before it; nothing is moved.
    """
    damaged: list[tuple[pathlib.Path, str]] = []
    for saved in reversed(saved_steps(workdir)):
        if step is not None and saved > step:
            continue
        folder = workdir / "checkpoints" / str(saved)
        reason = integrity.damage(folder)
        if reason is None:
            return [_set_aside(workdir, *one, saved) for one in damaged]
        damaged.append((folder, reason))
    if damaged:
        raise _unreadable(*damaged[0])
    return []


def _set_aside(workdir: pathlib.Path, folder: pathlib.Path, reason: str, whole: int) -> str:
    """Moves a damaged checkpoint and returns the line that says so; whole: the step from which the run goes on."""
    (workdir / DAMAGED).mkdir(exist_ok=True)
    place, number = workdir / DAMAGED / folder.name, 1
    while place.exists():
        number += 1
        place = workdir / DAMAGED / f"{folder.name}_{number}"
    folder.rename(place)
    return (
        f"WARNING: checkpoint {folder} is damaged ({reason}): the run goes on from that of step {whole}, and the "
        f"damaged one lies in {place} (delete it)"
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
    reason = integrity.damage(folder)
    if reason is not None:
        raise _unreadable(folder, reason)
    args = ocp.args.PyTreeRestore(
        item=wanted, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
    )
    try:
        with event_loops.patient(), ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "default", args=args)["params"]
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
        reason = " ".join(str(error).split())[:160]
    raise _unreadable(folder, reason)


def read_state(workdir: pathlib.Path, step: int, state: Any) -> Any:
    """A checkpoint in the shapes and placement of `state`; errors as of `read_params`. Writes nothing."""
    folder = (workdir / "checkpoints" / str(step)).absolute()
    reason = integrity.damage(folder)
    if reason is not None:
        raise _unreadable(folder, reason)
    try:
        with event_loops.patient(), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / "default", state)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:160]
    raise _unreadable(folder, reason)


def _told_of_a_checkpoint(workdir: pathlib.Path, rows: int) -> bool:
    if (workdir / "inputs.json").exists():
        return (workdir / SAVED).exists()
    # Versions before inputs.json did not say.
    before = json.loads((workdir / "config.json").read_text())
    return rows >= min(before["checkpoint"]["every"], before["steps"])


def _unreadable(folder: pathlib.Path, reason: str) -> ValueError:
    directory, rows = folder.parent, folder.parents[1] / "metrics.jsonl"
    earlier = [step for step in saved_steps(folder.parents[1]) if step < int(folder.name)]
    whole = next((step for step in reversed(earlier) if integrity.damage(directory / str(step)) is None), None)
    if whole is not None:
        cure = f"delete that folder to resume from step {whole}"
    elif earlier:
        cure = f"no earlier one is whole, either; delete {directory} and {rows} to start again"
    else:
        cure = f"delete that folder and {rows} to start again"
    return ValueError(f"checkpoint {folder} cannot be read ({reason}): {cure}")


@dataclasses.dataclass
class Kept:
    """Which checkpoints Orbax keeps: the newest `newest`, each whose step is a multiple of `every` (0: none), and the
    best by `scores`, which grow as the run goes on."""

    newest: int
    scores: Mapping[int, Score]
    choice: Choice = best_checkpoint.highest
    every: int = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, in the order of their steps, whether it stays."""
        del context
        steps = [one.step for one in checkpoints]
        kept = {*steps[-self.newest :], self.choice(steps, self.scores)}
        kept |= {step for step in steps if self.every and step % self.every == 0}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run, under WORKDIR/checkpoints/STEP."""

    def __init__(self, workdir: pathlib.Path, cfg: Checkpoint):
        # On a CPU a device array and its host copy may share memory, which the next update reuses: write at once.
        self.asynchronous = jax.default_backend() != "cpu"
        # By steps, what `cfg.best` compares of the evaluation after them; the same on every process.
        self.scores: dict[int, Score] = {}
        policy = Kept(cfg.keep, self.scores, best_checkpoint.chosen_by(cfg.best), cfg.keep_every)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, enable_async_checkpointing=self.asynchronous)
        self.workdir = workdir
        self.directory = (workdir / "checkpoints").absolute()
        self.every = cfg.every
        self.sealing: Future[None] | None = None  # the digests of a checkpoint that is written meanwhile
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="digests")
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
        hosts.on_process_zero(self._check_there)
        begun = self.manager.latest_step()
        self._finish_sealing()
        try:
            with event_loops.patient(lasting=self.asynchronous):
                self.manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception:
            if not hosts.several_processes():
                self._remove_unfinished()
            raise
        # Orbax finishes one checkpoint before it begins the next.
        if hosts.is_process_zero():
            if self.asynchronous:
                self.sealing = self.threads.submit(self._seal_when_complete, step)
            else:
                self._seal(step)
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
            with event_loops.patient():
                restored = self.manager.restore(step, args=ocp.args.StandardRestore(state))
            if step is not None and hosts.is_process_zero() and not integrity.is_sealed(self.directory / str(step)):
                self._seal(step)  # of a version before, or of a run that was killed before it had its digests
            return restored
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
            reason = " ".join(str(error).split())[:160]
        gc.collect()
        raise _unreadable(self.directory / str(step), reason)

    def close(self) -> None:
        """Waits for writes under way."""
        self.manager.wait_until_finished()
        self._finish_sealing()
        if hosts.is_process_zero():
            self._record(self.latest())
        self.manager.close()
        self.threads.shutdown()

    def finish_alone(self) -> None:
        """Waits for a write under way before the run ends by an error, so that nobody starts there meanwhile.

        Not with several processes, which might wait for each other.
        """
        if not hosts.several_processes():
            with contextlib.suppress(Exception):
                self.manager.wait_until_finished()
                self._finish_sealing()
            self._remove_unfinished()  # where that write has failed

    def _check_there(self) -> None:
        """Refuses to write where the folder of all checkpoints is gone, as with its disk: Orbax would make it anew."""
        if not self.directory.is_dir():
            raise ValueError(
                f"{self.directory} is gone, with the checkpoints in it: put it back (is its disk mounted?), and give "
                "the same command again"
            )

    def _seal(self, step: int) -> None:
        """Writes the digests of a complete checkpoint, and of what the run keeps on the host beside it."""
        integrity.seal(self.directory / str(step), [host_state.path_of(self.workdir.absolute(), step)])

    def _seal_when_complete(self, step: int) -> None:
        """`_seal`, after Orbax has renamed the folder; nothing where the write has failed, which Orbax reports."""
        while self.manager.is_saving_in_progress() and not (self.directory / str(step)).is_dir():
            time.sleep(_LOOK)
        if (self.directory / str(step)).is_dir():
            self._seal(step)

    def _finish_sealing(self) -> None:
        """Waits for digests under way; errors as of `_seal`."""
        if self.sealing is not None:
            sealing, self.sealing = self.sealing, None
            sealing.result()

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
            for path in self.directory.glob("*/digests.part"):
                path.unlink(missing_ok=True)
            if not parts:
                break
            time.sleep(0.05)  # threads of a write that failed may still add files
