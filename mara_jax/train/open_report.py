"""The table and the figure of a run whose answers are not known beforehand: its first steps against its last."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mara_jax.core import diversity
from mara_jax.plot_style import OWN, QUIET, horizontal_grid, save, style
from mara_jax.train import report
from mara_jax.train.tables import NumberTable

# metric -> heading in the table, title in the figure
SERIES = {
    "reward/mean": ("reward", "reward"),
    "valid/fraction": ("valid", "share of completions with an answer"),
    "answers/entropy_bits": ("bits", "entropy of a prompt's answers (bits)"),
    "answers/effective": ("effective", "effective number of a prompt's answers"),
    "answers/distinct": ("distinct", "different answers of a group"),
    "kl/reverse": ("KL", "KL to the reference (nats a completion)"),
}


def final_table(record: report.Record) -> NumberTable:
    """Each metric over the first and over the last steps of a run, with its sample deviation between steps.

    Above them the reference policy, where it was measured before training.
    """
    headers = ["", *(heading for heading, _ in SERIES.values())]
    title = f"{record.method}, beta {record.config['algorithm']['beta']:g}: how the run changed its completions"
    table = NumberTable.with_headers(*headers, lines=True, title=title)
    table.caption = (
        "bits, effective: entropy and effective number of a prompt's answers; distinct: in a group; KL: nats"
    )
    measured = record.reference.get("measured")
    if measured:
        table.add_row("reference", *("-" if measured[key] is None else f"{measured[key]:.3f}" for key in SERIES))
    steps = min(diversity.WINDOW, max(len(record.rows) // 2, 1))
    parts = {f"first {steps} steps": slice(steps), f"last {steps} steps": slice(-steps, None)}
    if len(record.rows) < 2:
        parts = {"the only step": slice(None)} if record.rows else {}
    for name, part in parts.items():
        values = [record.series(key)[part] for key in SERIES]
        table.add_row(name, *(_with_deviation(value) for value in values))
    return table


def _with_deviation(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    spread = f"\n[dim]± {finite.std(ddof=1):.3f}[/dim]" if len(finite) > 1 else ""
    return report.number_text(report.mean_of_finite(values), ".3f") + spread


def final_figure(record: report.Record) -> Path:
    """Draws the metrics of `SERIES` step by step into figure.png (and .svg) of the run's folder."""
    with style():
        figure = Figure(figsize=(12.0, 6.6), dpi=150)
        axes = figure.subplots(2, 3, sharex=True)
        figure.subplots_adjust(left=0.05, right=0.985, top=0.82, bottom=0.085, hspace=0.25, wspace=0.2)
        step = record.series("step")
        for ax, (key, (_, title)) in zip(axes.flat, SERIES.items(), strict=True):
            values = record.series(key)
            ax.plot(step, values, color=OWN, linewidth=2, marker="o" if len(step) < 4 else None, markersize=5)
            ax.set_title(title, loc="left", fontsize=11)
            finite = values[np.isfinite(values)]
            ax.set_ylim(min(0.0, 1.1 * finite.min(initial=0.0)), max(1.15 * finite.max(initial=0.0), 0.1))
            horizontal_grid(ax)
        for ax in axes[1]:
            ax.set_xlabel("step")
        name = f"{record.method}, $\\beta$ = {record.config['algorithm']['beta']:g}"
        figure.text(0.012, 0.965, name, fontsize=16, fontweight="bold", va="top")
        objective = textwrap.fill(record.reference["objective"], 150)
        figure.text(0.012, 0.915, objective, fontsize=10, color=QUIET, va="top")
        return save(figure, record.workdir / "figure.png")
