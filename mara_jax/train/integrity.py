"""Digests of a checkpoint's files, by which damage is noticed before anything is computed from it.

Orbax and TensorStore have checksums of their indexes alone. A byte that changes in an array's file is decompressed to
other numbers, or to an error, as it happens.
"""

import json
import os
import pathlib
from collections.abc import Sequence

from mara_jax.train import inputs
from mara_jax.train import workdir as workdirs

FILE = "digests.json"  # in the folder of a checkpoint
PARTS = ("_CHECKPOINT_METADATA", "default/_METADATA", "default/manifest.ocdbt")  # of every complete checkpoint


def seal(folder: pathlib.Path, beside: Sequence[pathlib.Path] = ()) -> None:
    """Writes the digests of a complete checkpoint's files, whole or not at all.

    Args:
      beside: files elsewhere in the run directory that belong to it; those that are not there are left out.
    """
    own = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stem != pathlib.Path(FILE).stem]
    files = [*own, *(path for path in beside if path.is_file())]
    digests = {os.path.relpath(path, folder): [path.stat().st_size, inputs.digest(path)] for path in files}
    workdirs.write_json(folder / FILE, {"files": digests})


def is_sealed(folder: pathlib.Path) -> bool:
    """Whether the digests of a checkpoint are there."""
    return (folder / FILE).exists()


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words; None where nothing is.

    Of a checkpoint without digests, as versions before wrote them, only the parts are looked for that each one has.
    """
    lost = [name for name in PARTS if not (folder / name).is_file()]
    if lost:
        return f"it lacks {lost[0]}"
    if not is_sealed(folder):
        return None
    try:
        files = json.loads((folder / FILE).read_text())["files"]
        known = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {FILE} cannot be read"
    try:
        for name, (size, _) in known.items():  # sizes first, which cost nothing
            here = (folder / name).stat().st_size
            if here != size:
                return f"{_place(name)} has {here} bytes of {size}"
        changed = next((name for name, (_, digest) in known.items() if inputs.digest(folder / name) != digest), None)
    except FileNotFoundError as error:
        return f"it lacks {_place(os.path.relpath(error.filename, folder))}"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None if changed is None else f"{_place(changed)} is not what was written"


def _place(name: str) -> str:
    """A file's name as it is told; one beside the checkpoint by its place in the run directory."""
    return name.removeprefix("../../")
