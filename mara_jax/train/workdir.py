"""The folder of a run: whose it is, and that a run is resumed only by its own config."""

import dataclasses
import json
import pathlib

from mara_jax.config import Run

# What may differ between a run and its resumption.
RESUMABLE = ("steps", "show_samples", "checkpoint", "mesh")


def check(workdir: pathlib.Path, run: Run) -> None:
    """Refuses a folder that another config, or something else, made. Writes nothing.

    Raises:
      ValueError: naming the fields that differ, or the folder that is not a run's.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): delete the workdir, or choose another") from error
        fields = sorted(_differences(before, _as_json(run)))
        changed = [name for name in fields if name.split(".")[0] not in RESUMABLE]
        if changed:
            raise ValueError(
                f"workdir {workdir} was made by another config (differs in {', '.join(changed)}): "
                "choose another --workdir, or delete this one"
            )
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"workdir {workdir} exists and holds no run: choose another --workdir")


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
        return [name for found in nested for name in found]
    return [] if before == now else [where]
