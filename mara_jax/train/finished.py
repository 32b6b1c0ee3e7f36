"""WORKDIR/finished.json: that a run has done all that was asked for, so that asking once more is no success."""

import json
import pathlib

from mara_jax.train import checkpoint
from mara_jax.train import workdir as workdirs

FILE = "finished.json"  # the last that a run writes


def check(workdir: pathlib.Path, steps: int) -> None:
    """Refuses a run that has nothing left to do: its last step is saved, and all is written that follows it.

    A run whose newest checkpoint has gone since has steps left.

    Raises:
      ValueError: naming what to ask for instead.
    """
    try:
        before = json.loads((workdir / FILE).read_text())
        asked, newest = int(before["steps"]), {str(name): int(step) for name, step in before["newest"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # there is none, or it says nothing: it is written again
    last = min(newest.values(), default=0)
    ended_by_task = last < asked  # then no number of steps makes it longer
    if not last or newest != _newest(workdir) or not (asked == steps or (ended_by_task and steps >= last)):
        return
    raise ValueError(
        f"no step is left: {workdir} has ended after step {last} (steps={steps}): ask for more by --config.steps"
        f"{', which its task does not allow' if ended_by_task else ''}, write a policy again by mara_jax.export, or "
        "choose another --workdir"
    )


def record(workdir: pathlib.Path, steps: int) -> None:
    """Notes that a run of so many steps has ended, with the newest checkpoint of it, or of each of its members."""
    workdirs.write_json(workdir / FILE, {"steps": steps, "newest": _newest(workdir)})


def _newest(workdir: pathlib.Path) -> dict[str, int]:
    """The step of the newest checkpoint in each folder of a run that has any."""
    saved = {str(path.parent.relative_to(workdir)): checkpoint.saved_steps(path.parent) for path in _folders(workdir)}
    return {name: max(steps) for name, steps in saved.items() if steps}


def _folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted([*workdir.glob("checkpoints"), *workdir.glob("members/*/checkpoints")])
