"""What all processes of a run must have in common: the code, the versions of packages, and the config."""

import collections
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import mara_jax

PACKAGES = ("jax", "jaxlib", "numpy")
SOURCES = pathlib.Path(mara_jax.__file__).parent
_MOST = 3  # differences that a line names

# Of a process: "code", "version/NAME" or "config/SECTION.FIELD" -> a digest, a version, or a value as JSON.
Fingerprint = dict[str, str]


def of_process(settings: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of this process.

    Args:
      settings: the run's, nested; what JSON cannot hold is taken as `repr` writes it.
    """
    versions = {f"version/{name}": importlib.metadata.version(name) for name in PACKAGES}
    own = {"version/mara_jax": mara_jax.__version__, "version/python": platform.python_version()}
    config = {f"config/{name}": json.dumps(value, default=repr) for name, value in _flat(settings)}
    return {"code": of_sources(SOURCES)} | own | versions | config


def of_sources(folder: pathlib.Path) -> str:
    """A digest of the names and bytes of all Python files below a folder."""
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def refusal(of_processes: Mapping[int, Fingerprint], names: Mapping[int, str]) -> str | None:
    """A line that names the processes whose fingerprint is not that of most, and what differs; None where none does.

    Where as many have one as another, process 0's counts.
    """
    texts = {process: json.dumps(one, sort_keys=True) for process, one in sorted(of_processes.items())}
    right, _ = collections.Counter(texts.values()).most_common(1)[0]  # of equally many the one that was met first
    wrong = [process for process, text in texts.items() if text != right]
    if not wrong:
        return None
    expected, other = json.loads(right), of_processes[wrong[0]]
    differing = sorted(name for name in expected.keys() | other.keys() if expected.get(name) != other.get(name))
    words = [_words(name, other.get(name), expected.get(name)) for name in differing[:_MOST]]
    if len(differing) > _MOST:
        words.append(f"{len(differing) - _MOST} more")
    who = ", ".join(names[process] for process in wrong[:_MOST]) + ", ..." * (len(wrong) > _MOST)
    verb = "differs" if len(wrong) == 1 else "differ"
    return (
        f"{who} {verb} from the other processes of the run ({', '.join(words)}): "
        "start all of them with the same code, packages and flags"
    )


def _words(name: str, found: str | None, expected: str | None) -> str:
    kind, _, field = name.partition("/")
    if kind == "code":
        return f"its files of mara_jax have digest {found} instead of {expected}"
    return f"{field} {found} instead of {expected}" if kind == "version" else f"{field}={found} instead of {expected}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in settings.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return pairs
