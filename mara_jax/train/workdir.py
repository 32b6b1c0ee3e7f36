"""The folder of a run: whose it is, and that a run is resumed only by its own config."""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from mara_jax.config import LanguageRun, ToyRun, resolve
from mara_jax.train import lock, strict_json, watchdog

# What may differ between a run and its resumption.
RESUMABLE = (
    "steps", "show_samples", "guard", "guard_limit", "watchdog", "watchdog_ends", "tracker", "checkpoint", "mesh",
    "profile",
)  # fmt: skip
RESUMABLE_FIELDS = ("evaluation.every", "rollout.long_prompts", "population.at_once")  # of sections that else may not
# All that a run has left which ended before its first result: nothing in it is worth keeping from another config.
_BEGUN = {"config.json", "config.part", "inputs.json", "inputs.part", lock.FILE, lock.NAMED, watchdog.FOLDER}


def check(workdir: pathlib.Path, run: Any, may_differ: Sequence[str] = ()) -> None:
    """Refuses a folder that another config, or something else, made, or that cannot be written. Writes nothing.

    run: a `Run`, or another dataclass of settings; may_differ: fields in which they may differ, beside RESUMABLE.

    Raises:
      ValueError: naming the fields that differ, or the folder that is not a run's or no folder at all.
    """
    check_place(workdir)
    path = workdir / "config.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): delete the workdir, or choose another") from error
        if not isinstance(before, dict):
            raise ValueError(f"{path} is no run's config: delete the workdir, or choose another")
        if "algorithm" in before and only_begun(workdir):
            return
        fields = sorted(_differences(before, _as_json(run)))
        allowed = {*RESUMABLE_FIELDS, *may_differ}
        changed = [name for name in fields if name.split(".")[0] not in RESUMABLE and name not in allowed]
        if changed:
            raise ValueError(
                f"workdir {workdir} was made by another config (differs in {', '.join(changed)}): "
                "choose another --workdir, or delete this one"
            )
    elif workdir.exists() and (not workdir.is_dir() or not only_begun(workdir)):
        raise ValueError(f"workdir {workdir} exists and holds no run: choose another --workdir")


def read_run(workdir: pathlib.Path, flag: str) -> LanguageRun:
    """The configuration of a language model's run.

    Args:
      flag: the command's that names the folder.

    Raises:
      FileNotFoundError, ValueError: one line; there is no such run, or it is the toy's.
    """
    path = workdir / "config.json"
    if (workdir / "population.json").exists():
        raise ValueError(f"{workdir} is a population: {flag} names one of its members, as {workdir}/members/NAME")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {flag} names the workdir of a run that has begun")
    try:
        run = resolve(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if isinstance(run, ToyRun):
        raise ValueError(f"{workdir} is a toy run: this command is for runs of language models")
    return run


def check_place(workdir: pathlib.Path) -> None:
    """Refuses a path where no file can be made.

    Raises:
      ValueError: one line.
    """
    place = workdir.absolute()
    try:
        place = next(path for path in (place, *place.parents) if path.exists())
        if place.is_dir():
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"workdir {workdir}: {place} cannot be written ({reason}); choose another --workdir"
        ) from error
    if not place.is_dir():
        raise ValueError(f"workdir {workdir} cannot be made: {place} is a file; choose another --workdir")


def only_begun(workdir: pathlib.Path) -> bool:
    """Whether the folder holds no result of a run, nor anything else."""
    return all(path.name in _BEGUN or _is_unfinished(path) for path in workdir.glob("*"))


def claim(workdir: pathlib.Path, run: Any) -> None:
    """Makes the folder, removes folders that a kill left half written, and writes config.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    for path in [path for path in workdir.iterdir() if _is_unfinished(path)]:
        shutil.rmtree(path)
    write_json(workdir / "config.json", _as_json(run))


def _is_unfinished(path: pathlib.Path) -> bool:
    """Whether this is a folder of weights that was being written, which hf.export renames at its end."""
    return path.name.startswith((".reference.", ".adapter.", ".model.")) and path.is_dir()


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes strict JSON to a sibling and renames it, so that a kill leaves the old file or the new one."""
    replace(path, strict_json.text(value, indent=1) + "\n")


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file by way of a sibling; where that fails, nothing of it is left."""
    part = path.with_suffix(".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _as_json(run: Any) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(run)))


def _differences(before: object, now: object, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = before.keys() | now.keys()
        nested = (_differences(before.get(n), now.get(n), f"{where}.{n}" if where else n) for n in names)
        return [name for names_below in nested for name in names_below]
    return [] if before == now else [where]
