"""The evaluations of a run as it left them: a table of first, best and last, and a figure of all."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mara_jax.config import COVERAGE
from mara_jax.plot_style import OWN, QUIET, REFERENCE, VANILLA, horizontal_grid, save, style
from mara_jax.train import best_checkpoint, checkpoint, held_out, metrics, report
from mara_jax.train.tables import NumberTable

# measure -> heading in the table; with them the first and the last pass@k
COLUMNS = {
    "reward": "reward",
    "valid": "valid",
    "answers/distinct": "distinct",
    "answers/good": "good",
    "answers/effective": "effective",
}


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rows of evaluation.jsonl; none where no evaluation was made.

    Raises:
      ValueError: a line that is no evaluation.
    """
    return metrics.read_rows(workdir / held_out.FILE, held_out.FIELDS)


def best_step(workdir: Path, measure: str) -> int | None:
    """The step of the best checkpoint that is there, by a measure of the evaluations; None where there is none."""
    samples = report.read_config(workdir)["evaluation"]["samples"] if measure == COVERAGE else 0
    of_rows = {row["step"]: held_out.score_of(workdir, row, measure, samples) for row in read(workdir)}
    scores = {step: one for step, one in of_rows.items() if one is not None}
    return best_checkpoint.chosen_by(measure)(checkpoint.saved_steps(workdir), scores)


def final_table(workdir: Path, best: str = "") -> NumberTable | None:
    """First, best and last evaluation, and the change from first to last; None where none was made.

    best: the measure by which a checkpoint is kept, if any. A change is a mean over the prompts, with its standard
    error between them.
    """
    rows = read(workdir)
    if not rows:
        return None
    passes = [name for name in rows[0] if name.startswith("pass@")]
    names = ["reward", *dict.fromkeys((passes[0], passes[-1])), *(name for name in COLUMNS if name != "reward")]
    table = NumberTable.with_headers("", *(COLUMNS.get(name, name) for name in names), title="evaluation")
    table.caption = "means over the prompts; distinct, good, effective: numbers of a prompt's answers"
    table.caption += f"; best: by {best}" if best else ""
    step = best_step(workdir, best) if best else None
    words = {rows[0]["step"]: "", step: " (best)"} | ({rows[-1]["step"]: " (last)"} if len(rows) > 1 else {})
    if step == rows[-1]["step"]:
        words[step] = " (best, last)"
    for row in rows:
        if row["step"] in words:
            table.add_row(f"step {row['step']}{words[row['step']]}", *(f"{row[name]:.3f}" for name in names))
    changes = _changes(workdir, rows[0]["step"], rows[-1]["step"], names)
    if changes:
        table.add_row("last - first", *changes)
    return table


def _changes(workdir: Path, first: int, last: int, names: list[str]) -> list[str]:
    """Mean change of each measure over the prompts and its standard error, as texts; none where they are not known."""
    paths = [held_out.table_of(workdir, step) for step in (first, last)]
    if first == last or not all(path.is_file() for path in paths):
        return []
    tables = [json.loads(path.read_text(encoding="utf-8"))["prompts"] for path in paths]
    cells = []
    for name in names:
        change = np.array([after[name] - before[name] for before, after in zip(*tables, strict=True)])
        error = np.std(change, ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        cells.append(f"{change.mean():+.3f}" + (f"\n[dim]± {error:.3f}[/dim]" if math.isfinite(error) else ""))
    return cells


def final_figure(workdir: Path) -> Path:
    """Draws the measures of all evaluations by steps into evaluation.png (and .svg) of the run's folder."""
    rows = read(workdir)
    step = [row["step"] for row in rows]
    passes = [name for name in rows[0] if name.startswith("pass@")]
    panels = {
        "reward, and share with an answer": (["valid", "reward"], [REFERENCE, OWN]),
        "pass@k": (passes, [OWN] * len(passes)),
        "a prompt's answers: how many": (
            ["answers/distinct", "answers/good", "answers/effective"],
            [REFERENCE, VANILLA, OWN],
        ),
    }
    with style():
        figure = Figure(figsize=(12.0, 3.8), dpi=150)
        axes = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.045, right=0.985, top=0.86, bottom=0.13, wspace=0.2)
        for ax, (title, (names, colours)) in zip(axes, panels.items(), strict=True):
            for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
                shade = 1.0 if name not in passes else 0.35 + 0.65 * place / max(len(passes) - 1, 1)
                label = name.removeprefix("answers/")
                ax.plot(
                    step, [row[name] for row in rows], color=colour, alpha=shade, marker="o", markersize=4, label=label
                )
            ax.set_title(title, loc="left", fontsize=11)
            ax.set_xlabel("step")
            values = [row[name] for row in rows for name in names]
            ax.set_ylim(min(0.0, 1.1 * min(values)), max(1.1 * max(values), 0.1))
            horizontal_grid(ax)
            ax.legend(frameon=False, fontsize=9, labelcolor=QUIET)
        return save(figure, workdir / "evaluation.png")
