"""Where metrics go beside metrics.jsonl: TensorBoard's events, and the tracker that the config names."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from mara_jax.config import LanguageRun
from mara_jax.train import metrics
from mara_jax.train import workdir as workdirs
from mara_jax.train.events import Events

FOLDER = "tensorboard"  # in WORKDIR
FILE = "tracker.json"  # in WORKDIR: which run of a tracker this is, and which steps it has


class Tracked(Protocol):
    """A run of a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class _Wandb:
    """A run of Weights & Biases, in WORKDIR/wandb where it is offline (WANDB_MODE=offline)."""

    def __init__(self, cfg: LanguageRun, workdir: pathlib.Path, number: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        project = os.environ.get("WANDB_PROJECT", "mara_jax")
        settings = wandb.Settings(console="off", silent=True)
        about = {
            "project": project,
            "name": workdir.resolve().name,
            "config": dataclasses.asdict(cfg),
            "dir": str(workdir),
        }
        self.run = wandb.init(**about, id=number, resume="allow", settings=settings)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({"step": step, **values})

    def finish(self) -> None:
        self.run.finish()


class _Trackio:
    """A run of trackio, in TRACKIO_DIR."""

    def __init__(self, cfg: LanguageRun, workdir: pathlib.Path, number: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        project, name = os.environ.get("TRACKIO_PROJECT", "mara_jax"), f"{workdir.resolve().name}-{number}"
        hardware = {"auto_log_gpu": False, "auto_log_cpu": False}
        self.run = trackio.init(project, name, config=dataclasses.asdict(cfg), resume="allow", **hardware)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        self.run.finish()


KINDS = {"wandb": _Wandb, "trackio": _Trackio}


def check(tracker: str) -> None:
    """Refuses a tracker that cannot be used here.

    Raises:
      ValueError: its package is missing, or nobody is logged in.
    """
    if not tracker:
        return
    if importlib.util.find_spec(tracker) is None:
        raise ValueError(f'tracker={tracker}: its package is not installed: pip install "mara_jax[{tracker}]"')
    if tracker == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb  # pyright: ignore[reportMissingImports]

        if not wandb.login(prompt=False):
            raise ValueError("tracker=wandb: nobody is logged in: give `wandb login`, or set WANDB_MODE=offline")


class Trackers:
    """Writes rows to TensorBoard and to the tracker. A resumed run goes on in both.

    A tracker keeps what it has: of the steps behind the restored one, which are made again and are the same, it is told
    those that it may not have yet. It sends rows after it was told them, so a row counts as sent with the next one.

    keeps: whether this process writes.
    """

    def __init__(
        self, cfg: LanguageRun, workdir: pathlib.Path, steps_done: int, display: metrics.Display, keeps: bool
    ) -> None:
        self.events, self.tracked, self.display = None, None, display
        if not keeps:
            return
        self.events = Events(workdir / FOLDER, steps_done)
        if not cfg.tracker:
            return
        self.name, self.path = cfg.tracker, workdir / FILE
        known = _read(self.path)
        # By the names of trackers: the run's number, and by the prefixes of rows the last step that was sent.
        self.known = known | {self.name: known.get(self.name, {"id": secrets.token_hex(4), "last": {}})}
        self.sent, self.told = self.known[self.name]["last"], {}
        workdirs.write_json(self.path, self.known)
        try:
            self.tracked: Tracked | None = KINDS[self.name](cfg, workdir, self.known[self.name]["id"])
        except Exception as error:
            raise ValueError(
                f"tracker={self.name} cannot start ({_line(error)}): mend that, or leave tracker empty"
            ) from error

    def write(self, row: Mapping[str, Any], prefix: str = "") -> None:
        """The numbers of a row, under their names behind a prefix."""
        if self.events is None:
            return
        step, values = row["step"], _numbers(row, prefix)
        self.events.write(step, values)
        if self.tracked is None or step <= self.sent.get(prefix, -1):
            return
        try:
            self.tracked.log(values, step)
        except Exception as error:
            self.tracked = None
            self.display.note(f"WARNING: tracker={self.name} failed ({_line(error)}): the run goes on without it")
            return
        if prefix in self.told:
            self.sent[prefix] = self.told[prefix]
            workdirs.write_json(self.path, self.known)
        self.told[prefix] = step

    def close(self) -> None:
        """Ends what this process has begun."""
        if self.events is not None:
            self.events.close()
        if self.tracked is not None:
            self.tracked.finish()
            self.sent |= self.told
            workdirs.write_json(self.path, self.known)


def _numbers(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a row but its step; those that are null or not finite are left out."""
    values = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
    return {prefix + name: float(value) for name, value in values.items() if math.isfinite(value)}


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
        if all(isinstance(one["id"], str) and isinstance(one["last"], dict) for one in known.values()):
            return known
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is no record of tracked runs: delete it, and the run is tracked as a new one")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
