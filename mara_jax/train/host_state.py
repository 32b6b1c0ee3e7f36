"""What a run keeps on the host beside its parameters, saved with every checkpoint and restored exactly.

That is the state of a task (`Task.keeps_state`) and of what is collected from its scores. It is plain data, in
WORKDIR/task_state/step_N.json beside the checkpoint of step N.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from mara_jax.parallel import hosts
from mara_jax.train import workdir as workdirs
from mara_jax.train.setup import Setup

FOLDER = "task_state"


class _Kept(Protocol):
    def state(self) -> Any: ...
    def restore(self, state: Any) -> None: ...


def _parts(setup: Setup) -> dict[str, _Kept]:
    """What is kept, by the names that the file has for it."""
    parts: dict[str, Any] = {
        "task": setup.task if setup.task.keeps_state else None,
        "known_strings": setup.known_strings,
        "replay": setup.replay,
    }
    return {name: part for name, part in parts.items() if part is not None}


def is_kept(setup: Setup) -> bool:
    """Whether a run keeps anything on the host that scores change."""
    return bool(_parts(setup))


def path_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """Where what is kept after `step` steps lies, if anything is."""
    return workdir / FOLDER / f"step_{step:06d}.json"


def save(setup: Setup, workdir: pathlib.Path, step: int, saved: Sequence[int]) -> None:
    """Writes what is kept after `step` steps, before its checkpoint is written; nothing where nothing is kept.

    Args:
      saved: steps at which there are checkpoints; the files of others are removed.
    """
    parts = _parts(setup)
    if not parts:
        return
    values = {"step": step} | {name: part.state() for name, part in parts.items()}

    def write() -> None:
        path = path_of(workdir, step)
        path.parent.mkdir(exist_ok=True)
        # A kill between this file and its checkpoint leaves one too many, which the next save removes.
        workdirs.replace(path, json.dumps(values, allow_nan=False) + "\n")
        kept = {path_of(workdir, number) for number in [*saved, step]}
        for other in path.parent.iterdir():
            if other not in kept:
                other.unlink()

    hosts.on_process_zero(write)


def restore(setup: Setup, workdir: pathlib.Path, step: int) -> None:
    """Takes back what was kept after `step` steps.

    Raises:
      ValueError: one line; the file is missing, damaged, or of another task.
    """
    parts, path = _parts(setup), path_of(workdir, step)
    if not parts:
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, part in parts.items():
            part.restore(values[name])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}, which belongs to the checkpoint of step {step}, cannot be read ({type(error).__name__}): delete "
            f"{workdir / 'checkpoints' / str(step)} to resume from an earlier one, or choose another --workdir"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
