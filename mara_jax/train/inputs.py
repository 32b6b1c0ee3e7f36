"""What a run depends on beside its config, recorded in WORKDIR/inputs.json and compared when the run is resumed.

Weights, tokenizer and prompts must be what the run began with. The code of rewards and the versions of packages may
change: that is noted, and recorded.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import mara_jax
from mara_jax import hf
from mara_jax.config import LanguageRun
from mara_jax.parallel import hosts
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Task
from mara_jax.tasks.checked import CheckedTask
from mara_jax.train import shape
from mara_jax.train import workdir as workdirs
from mara_jax.train.prompts import EncodedPrompts

FILE = "inputs.json"
ROWS = 64  # prompts, evenly spaced over all, whose text and tokens are recorded
WEIGHTS, REFERENCE = "policy.weights", "reference"
MAY_CHANGE = ("reward code", "version")
_BLOCK = 2**23  # bytes that a thread reads at once
_PACKAGES = ("jax", "transformers", "tokenizers")
# Text in which tokenizers differ: case, digits, white space, several bytes a character, marks.
_PROBE = "It's  1234.5 %\n\tna\u00efve \u4f60\u597d \U0001f600 <think>a</think> END"

# Of a run: "GROUP" or "GROUP/NAME" -> a digest, or the version of a package.
Inputs = dict[str, str]


def pinned(workdir: pathlib.Path, cfg: LanguageRun) -> str:
    """The config's weights; a hub id with the commit that the run began with, or else the newest."""
    weights = cfg.policy.weights
    if weights == shape.NANO:
        return weights
    before = _recorded(workdir)
    return before["weights"] if before else hf.pinned(weights)


def of_files(cfg: LanguageRun, weights: str, group: str) -> Inputs:
    """Digests of every byte of the files of the model and of the adapter that a run reads.

    It reads them once before they are loaded, which leaves them in the page cache where there is room.

    Args:
      weights: as `hf.load` takes them, or "nano".
      group: what to call them, WEIGHTS or REFERENCE.
    """
    if group == REFERENCE:  # all that the run itself has written there
        files = [path for path in sorted(pathlib.Path(weights).iterdir()) if path.is_file()]
    else:
        files = [] if weights == shape.NANO else hf.files_of(weights)
    found = {f"{group}/{path.name}": digest(path) for path in files}
    if cfg.lora.adapter:
        folder = pathlib.Path(cfg.lora.adapter)
        found |= {f"lora.adapter/{p.name}": digest(p) for p in folder.glob("adapter_*") if p.is_file()}
    return found


def of_run(cfg: LanguageRun, task: Task, policy: Policy, evaluated: Task | None = None) -> Inputs:
    """Digests of tokenizer, prompts, reward model and the task's code, and the versions of packages.

    evaluated: the task of evaluations, if any are made.
    """
    prompts, tokenizer = EncodedPrompts(cfg, policy, task), policy.tokenizer
    rows = np.unique(np.linspace(0, len(task) - 1, ROWS).astype(int)).tolist()
    texts = [task.prompt(number) for number in rows]
    probe = tokenizer.encode(_PROBE)
    scoring = [] if task.learned_reward is None else hf.files_of(task.learned_reward.where)
    return {
        "tokenizer": _of([sorted(tokenizer.get_vocab().items()), probe, tokenizer.decode(probe), policy.eos_ids]),
        "chat template": _of(prompts.encode([_PROBE])),
        "prompts": _of([len(task), texts]),
        "prompt ids": _of(prompts.encode(texts)),
        **of_task(cfg, task, evaluated),
        **{f"reward model/{path.name}": digest(path) for path in scoring},
        **versions(),
    }


def of_task(cfg: LanguageRun, task: Task, evaluated: Task | None = None) -> Inputs:
    """Digests of the task's files and code; evaluated: as of `of_run`."""
    return {
        **{f"task file/{path}": digest(pathlib.Path(path)) for path in task.files()},
        **{f"evaluation file/{path}": digest(pathlib.Path(path)) for path in (evaluated.files() if evaluated else ())},
        **{f"reward code/{name}": digest(path) for name, path in _modules(cfg, task).items()},
        **{f"reward code/{path}": digest(pathlib.Path(path)) for path in task.code_files()},
    }


def refuse_other_files(cfg: LanguageRun, task: Task, evaluated: Task | None = None) -> None:
    """Compares the task's files and code between the processes of a run.

    Raises:
      ValueError: one line that names the first process that differs from process 0, on all of them.
    """
    if not hosts.several_processes():
        return
    first, *others = hosts.gather_json(of_task(cfg, task, evaluated))
    for process, other in enumerate(others, 1):
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            error = f"process {process} reads another {differing[0]} than process 0: give all processes the same files"
            hosts.raise_as_one(ValueError(error))


def versions() -> Inputs:
    """The versions of packages."""
    known = {f"version/{name}": importlib.metadata.version(name) for name in _PACKAGES}
    return known | {"version/mara_jax": mara_jax.__version__}


def check(workdir: pathlib.Path, now: Inputs) -> list[str]:
    """Compares inputs with those that the run began with; returns what is to be noted. Writes nothing.

    Raises:
      ValueError: one line that names the inputs which must not differ and do.
    """
    before = _recorded(workdir)
    if before is None:
        unknown = "what this run began with was not recorded: from here on it is what is there now"
        return [] if workdirs.only_begun(workdir) else [unknown]
    changed = _differences(before["inputs"], now)
    versions = [_words(name, before["inputs"], now) for name in changed if _group(name) == "version"]
    refused = [name for name in changed if _group(name) not in MAY_CHANGE]
    if refused:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        since = f"; since then {', '.join(versions)}" if versions else ""
        raise ValueError(
            f"workdir {workdir} is of a run that began with something else (differs in "
            f"{', '.join(refused[:4])}{more}{since}): restore that, or choose another --workdir"
        )
    code = [name.partition("/")[2] for name in changed if _group(name) == "reward code"]
    notes = [f"the code of {', '.join(code)} has changed since the run began: it goes on with the new one"] * bool(code)
    return notes + [f"{words} since the run began" for words in versions]


def record(workdir: pathlib.Path, weights: str, now: Inputs) -> None:
    """Adds inputs to the record, and what has changed to its list of changes; a run that only began starts anew."""
    before = _recorded(workdir) or {"weights": weights, "inputs": {}, "changes": []}
    changed = {name: before["inputs"].get(name) for name in _differences(before["inputs"], now)}
    if changed:
        before["changes"].append({"time": time.strftime("%Y-%m-%d %H:%M:%S"), "until then": changed})
    groups = {_group(name) for name in now}
    kept = {name: value for name, value in before["inputs"].items() if _group(name) not in groups}
    workdirs.write_json(workdir / FILE, before | {"inputs": kept | now})


def digest(path: pathlib.Path) -> str:
    """A digest of all bytes of a file: of the digests of its blocks, which threads make side by side."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        blocks = threads.map(lambda start: _of_block(path, start), range(0, max(path.stat().st_size, 1), _BLOCK))
        return hashlib.blake2b(b"".join(blocks), digest_size=16).hexdigest()


def _of_block(path: pathlib.Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.blake2b(file.read(_BLOCK), digest_size=16).digest()


def _of(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _modules(cfg: LanguageRun, task: Task) -> dict[str, pathlib.Path]:
    """The files of the modules that a task's classes and its `make` come from."""
    task = task.task if isinstance(task, CheckedTask) else task
    names = {cfg.task.module, *(kind.__module__ for kind in type(task).__mro__)}
    names -= {"builtins", "abc", Task.__module__}
    modules = {name: getattr(sys.modules.get(name), "__file__", None) for name in sorted(names)}
    return {name: pathlib.Path(file) for name, file in modules.items() if file and os.path.isfile(file)}


def _recorded(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What inputs.json holds; None where there is none, or the run has no result yet that depends on it."""
    path = workdir / FILE
    if not path.exists() or workdirs.only_begun(workdir):
        return None
    try:
        record = json.loads(path.read_text())
        if isinstance(record["inputs"], dict) and isinstance(record["changes"], list) and record["weights"]:
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no record of a run's inputs: delete it, and they are taken as they are now")


def _differences(before: Inputs, now: Inputs) -> list[str]:
    """Names in the groups that both have, of which one has no such entry or another."""
    groups = {_group(name) for name in before} & {_group(name) for name in now}
    names = sorted(name for name in before.keys() | now.keys() if _group(name) in groups)
    return [name for name in names if before.get(name) != now.get(name)]


def _group(name: str) -> str:
    return name.partition("/")[0]


def _words(name: str, before: Inputs, now: Inputs) -> str:
    return f"{name.partition('/')[2]} {before.get(name)} has become {now.get(name)}"
