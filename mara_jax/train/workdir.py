"""The folder of a run: whose it is, and that a run is resumed only by its own config."""

import dataclasses
import json
import pathlib
import tempfile

from mara_jax.config import Run

# What may differ between a run and its resumption.
RESUMABLE = ("steps", "show_samples", "guard", "guard_limit", "checkpoint", "mesh", "profile")
# All that a run has left which ended before its first result: nothing in it is worth keeping from another config.
_BEGUN = {"config.json", "config.part"}


def check(workdir: pathlib.Path, run: Run) -> None:
    """Refuses a folder that another config, or something else, made, or that cannot be written. Writes nothing.

    Raises:
      ValueError: naming the fields that differ, or the folder that is not a run's or no folder at all.
    """
    _check_place(workdir)
    path = workdir / "config.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): delete the workdir, or choose another") from error
        if isinstance(before, dict) and "algorithm" in before and {p.name for p in workdir.iterdir()} <= _BEGUN:
            return
        fields = sorted(_differences(before, _as_json(run)))
        changed = [name for name in fields if name.split(".")[0] not in RESUMABLE]
        if changed:
            raise ValueError(
                f"workdir {workdir} was made by another config (differs in {', '.join(changed)}): "
                "choose another --workdir, or delete this one"
            )
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"workdir {workdir} exists and holds no run: choose another --workdir")


def _check_place(workdir: pathlib.Path) -> None:
    """Refuses a path where no file can be made."""
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


def claim(workdir: pathlib.Path, run: Run) -> None:
    """Makes the folder and writes its config.json, whole or not at all."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", _as_json(run))


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes JSON to a sibling and renames it, so that a kill leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def _as_json(run: Run) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(run)))


def _differences(before: object, now: object, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = before.keys() | now.keys()
        nested = (_differences(before.get(n), now.get(n), f"{where}.{n}" if where else n) for n in names)
        return [name for names_below in nested for name in names_below]
    return [] if before == now else [where]
