"""Metrics of a run: one JSON object a step in metrics.jsonl, and what the terminal shows meanwhile."""

import collections
import contextlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mara_jax.train import strict_json
from mara_jax.train import workdir as workdirs
from mara_jax.train.tables import NumberTable

SHOWN = {
    "reward/mean": "reward",
    "valid/fraction": "valid",
    "task/oracle_calls": "oracle calls",
    "task/top10": "best ten",
    "task/hits": "hits",
    "answers/entropy_bits": "entropy (bits)",
    "kl/reverse": "KL (nats)",
    "length/mean": "length",
    "pairs/loss": "loss",
    "pairs/accuracy": "right",
    "held_out/loss": "held-out loss",
    "held_out/accuracy": "held-out right",
    "time/step_s": "s/step",
}
COUNTS = ("task/oracle_calls", "task/hits")  # of these, whole numbers

OF_A_STEP = ("step", "answers/by_prompt", "samples")  # fields of every row of metrics.jsonl


class Log:
    """metrics.jsonl, or another file of rows by steps: appended line by line, cut back to the restored step on resume.

    keeps: whether this process writes the file; on other processes rows are discarded; fields: of every row.
    """

    def __init__(
        self, path: pathlib.Path, steps_done: int, keeps: bool = True, fields: Sequence[str] = OF_A_STEP
    ) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.lost: list[int] = []  # steps before the restored one that the file has no row of
        self.file = None
        if not keeps:
            return
        kept = [row for row in read_rows(path, fields) if row["step"] <= steps_done]
        self.lost = sorted(set(range(1, steps_done + 1)) - {row["step"] for row in kept})
        write_rows(path, kept)
        self.rows = kept
        self.file = path.open("a")

    def warnings(self) -> list[str]:
        """A line where rows are lost; nothing else."""
        if not self.lost:
            return []
        return [f"WARNING: {self.path} has lost the rows of steps {first_of(self.lost)}: what reads it lacks them"]

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        if not self.path.exists():
            raise ValueError(f"{self.path} is gone, with all that the run would still write there: start it again")
        self.rows.append(row)
        try:
            self.file.write(strict_json.text(row) + "\n")
            self.file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self.file.close()  # or Python would try once more, and complain, as it exits
            raise

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def first_of(steps: Sequence[int]) -> str:
    """The first of some steps, as a line has them."""
    return ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line to a sibling and renames it: all of them or none."""
    workdirs.replace(path, "".join(strict_json.text(row) + "\n" for row in rows))


def read_rows(path: pathlib.Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file, each with these fields, without a last line that a kill cut short.

    Raises:
      ValueError: a whole line that is no step's.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= {*fields} or not _numbers(row):
            raise ValueError(f"{path}, line {number} is no step of a run: delete that line, or the workdir")
        if rows and row["step"] <= rows[-1]["step"]:
            raise ValueError(f"{path}, line {number} is step {row['step']} again: delete that line, or the workdir")
        rows.append(row)
    return rows


def _numbers(row: dict[str, Any]) -> bool:
    """Whether what a row has under names with a stroke are numbers, or null; answers are not."""
    values = [value for name, value in row.items() if "/" in name and not name.startswith("answers/")]
    return isinstance(row["step"], int) and all(value is None or isinstance(value, int | float) for value in values)


class Display:
    """What a person sees: a live panel on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, stream: Any = None):
        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self.steps = steps
        self.live: Live | None = None
        self.texts: collections.deque[tuple[str, bool]] = collections.deque(maxlen=4)
        self.latest: dict[str, Any] = {}
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar = None

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live = Live(self._panel(), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def warm_up(self, step: int, steps: int, loss: float) -> None:
        if self.live:
            self._advance("warm-up", step, steps)
            self.latest = {}
        elif step == steps or step <= 10 or step % 50 == 0:
            self.note(f"warm-up step {step}/{steps}  loss {loss:.3f} nats a token")

    def step(self, row: dict[str, Any], texts: list[tuple[str, bool]]) -> None:
        """Shows a step's metrics and some of its completions, each with whether it was rewarded."""
        self.latest = row
        self.texts.extend(texts)
        if self.live:
            self._advance("training", row["step"], self.steps)
            return
        parts = [f"{name} {_shown(key, row[key])}" for key, name in SHOWN.items() if key in row]
        self.note(f"step {row['step']}/{self.steps}  " + "  ".join(parts))
        for text, good in texts:
            self.note(f"    {'+' if good else '-'} {text!r}")

    def evaluation(self, row: dict[str, Any]) -> None:
        """A line that stays with the measures of an evaluation; of pass@k the first and the last."""
        names = [name for name in row if name.startswith("pass@")]
        shown = ["reward", *dict.fromkeys((names[0], names[-1])), "valid", "answers/effective"]
        parts = [f"{name.removeprefix('answers/')} {_number(row[name])}" for name in shown]
        self.note(f"evaluation after step {row['step']}: {'  '.join(parts)}  ({row['time/evaluation_s']:.1f} s)")

    def _advance(self, name: str, step: int, steps: int) -> None:
        if self.bar is None or self.progress.tasks[self.bar].description != name:
            for task in self.progress.task_ids:
                self.progress.update(task, visible=False)
            self.bar = self.progress.add_task(name, total=steps)
        self.progress.update(self.bar, completed=step)
        if self.live:
            self.live.update(self._panel())

    def _panel(self) -> Group:
        shown = {name: _shown(key, self.latest[key]) for key, name in SHOWN.items() if key in self.latest}
        table = NumberTable.with_headers(*shown, texts=0)
        table.add_row(*(Text(value, style="bold") for value in shown.values()))
        lines = [
            Text.assemble(
                ("✓ " if good else "✗ ", "green" if good else "red"),
                text.replace("\n", "⏎"),
                overflow="ellipsis",
                no_wrap=True,
            )
            for text, good in self.texts
        ]
        return Group(table, *lines, self.progress)


def _shown(key: str, value: float) -> str:
    return f"{value:,.0f}" if key in COUNTS else _number(value)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
