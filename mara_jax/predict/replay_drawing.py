"""The report of replayed rollouts: tables, notes and figure, from the record of `replay.replay`."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.markup import escape

from mara_jax import plot_style
from mara_jax.predict.drawing import COLOURS, NAMES, SHORT, to_json
from mara_jax.train import workdir
from mara_jax.train.tables import NumberTable

MOST_COLUMNS = 3  # answers with a column
PANELS = {
    "reward": "expected reward",
    "number": "effective number of answers",
    "effective_samples": "effective sample size",
}


def show(record: dict[str, Any], console: Console) -> None:
    """Prints what the rollouts are, both tables, and the notes."""
    rollouts, reference = record["rollouts"], record["reference"]
    first, last = rollouts["steps"]
    prompts = f"{rollouts['prompts']} prompts" if rollouts["prompts"] > 1 else "one prompt"
    console.print(
        f"rollouts: {rollouts['count']} completions of steps {first} to {last}, {prompts}, mean reward "
        f"{rollouts['reward']:.3f}; as samples of the reference they count as "
        f"{sum(one['effective_samples'] for one in reference):.0f}",
        markup=False,
    )
    console.print(optima_table(record))
    for line in _too_small(record):
        console.print(line, markup=False)
    console.print(batches_table(record))
    for line in record["notes"]:
        console.print(line, markup=False)


def label(record: dict[str, Any], setting: dict[str, Any]) -> str:
    """A setting's name: method and beta, KL and threshold where they vary; ">" before the run's own."""
    kl = f", {setting['kl']}" if _varies(record, "kl") else ""
    threshold = f", tau {setting['threshold']:g}" if _varies(record, "threshold") else ""
    mark = "> " if setting["own"] else "  "
    return f"{mark}{SHORT[setting['objective']]}{kl}, {setting['beta']:g}{threshold}"


def _varies(record: dict[str, Any], name: str) -> bool:
    return len({one[name] for one in record["settings"]}) > 1


def optima_table(record: dict[str, Any]) -> NumberTable:
    """Each setting's optimum: under the one prompt, with its answers, or a mean over prompts."""
    prompts = record["settings"][0]["prompts"]
    alone = prompts[0] if len(prompts) == 1 else None
    names = alone["answers"] if alone else []
    leading = sorted(np.argsort(-np.array(alone["share"]), kind="stable")[:MOST_COLUMNS].tolist()) if alone else []
    headers = ["reward", "good", *(escape(f'"{names[a]}"') for a in leading), "effective", "samples"]
    kl = "" if _varies(record, "kl") else f", {record['settings'][0]['kl']} KL"
    where = kl if alone else f"{kl}, means over {len(prompts)} prompts"
    table = NumberTable.with_headers(
        "method, beta", *headers, lines=True, title=f"where each setting ends: its optimum{where}"
    )
    for setting in record["settings"]:
        at = setting["prompts"][0] if alone else setting["mean"]
        texts = ["?"] * (len(headers) - 1)
        if not at["too_small"]:
            cells = [("reward", ".3f"), ("good", ".3f"), *((a, ".3f") for a in leading), ("number", ".2f")]
            texts = [_cell(at, name, form) for name, form in cells]
        style = "bold" if setting["own"] else None
        table.add_row(label(record, setting), *texts, f"{at['effective_samples']:.0f}", style=style)
    table.caption = (
        '">": the run\'s own settings; shares are of the completions with an answer; effective: number of answers; '
        "samples: effective sample size of the weights to that optimum; below each number: its 95 % bootstrap interval"
    )
    table.caption_justify = "left"
    return table


def _cell(at: dict[str, Any], name: str | int, form: str) -> str:
    key, place = ("share", name) if isinstance(name, int) else (name, None)
    value, low, high = (at[key + end] if place is None else at[key + end][place] for end in ("", "_low", "_high"))
    short = f".{max(int(form[1]) - 1, 1)}f"
    ends = (
        "" if low is None or format(low, form) == format(high, form) else f"\n[dim]{low:{short}}-{high:{short}}[/dim]"
    )
    return f"{value:{form}}{ends}"


def _too_small(record: dict[str, Any]) -> list[str]:
    """One line for each setting whose optimum the completions do not determine."""
    several = len(record["settings"][0]["prompts"]) > 1
    lines = []
    for setting in record["settings"]:
        at = setting["mean"] if several else setting["prompts"][0]
        if at["too_small"]:
            lines.append(f"?: {label(record, setting)[2:]}: {at['too_small']}")
    return lines


def batches_table(record: dict[str, Any]) -> NumberTable:
    """What the transform and the advantages of the stored batches would have been."""
    table = NumberTable.with_headers(
        "method, beta", "augmented", "reward", "|advantage|", "equal groups", "correlation",
        lines=True, title="signal of the stored batches, by the functions of training",
    )  # fmt: skip
    for setting in record["settings"]:
        batches, texts = setting["batches"], ["?"] * 5
        if batches:
            forms = {
                "augmented": ".3f",
                "reward": ".3f",
                "advantage": ".3g",
                "equal_groups": ".3f",
                "correlation": ".3f",
            }
            texts = [format(batches[name], form) for name, form in forms.items()]
        table.add_row(label(record, setting), *texts, style="bold" if setting["own"] else None)
    table.caption = (
        "augmented: share of the completions that the transform changes; reward: the mean of what it returns; equal "
        "groups: in which all of that is equal; correlation: of the advantages with those of the run's own settings"
    )
    table.caption_justify = "left"
    return table


def write(record: dict[str, Any], out: Path) -> Path:
    """Writes replay.json, replay.png and replay.svg.

    Args:
      record: as `replay.replay` makes it.
      out: a folder, created if it does not exist.

    Returns:
      The path of the PNG.
    """
    with plot_style.style():
        figure = draw(record)
        out.mkdir(parents=True, exist_ok=True)
        path = plot_style.save(figure, out / "replay.png")
    workdir.replace(path.with_suffix(".json"), to_json(record, indent=1) + "\n")
    return path


def draw(record: dict[str, Any]) -> Figure:
    """Expected reward, effective number of answers and effective sample size against beta, a line for each method."""
    figure = Figure(figsize=(12.0, 4.6), dpi=150)
    axes = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.055, right=0.985, top=0.77, bottom=0.22, wspace=0.24)
    for ax, (name, title) in zip(axes, PANELS.items(), strict=True):
        _panel(ax, record, name)
        ax.set_title(title, loc="left", fontsize=11.5)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xlabel("beta")
        plot_style.horizontal_grid(ax)
    axes[2].axhline(record["least"], color=plot_style.QUIET, linewidth=0.9, linestyle=":")
    axes[2].set_yscale("log")
    handles = {text: line for ax in axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="lower center", ncols=max(len(handles), 1), frameon=False)
    first, last = record["rollouts"]["steps"]
    figure.text(0.012, 0.965, "optima predicted from stored rollouts", fontsize=16, fontweight="bold", va="top")
    figure.text(
        0.012, 0.885, f"{record['rollouts']['count']} completions of steps {first} to {last}; hollow: too few effective"
        " samples; ringed: the run's own settings", fontsize=10.5, color=plot_style.QUIET, va="top",
    )  # fmt: skip
    return figure


def _panel(ax: Axes, record: dict[str, Any], name: str) -> None:
    """One quantity: a line with its interval for each method, KL and threshold."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for setting in record["settings"]:
        tau = f", tau {setting['threshold']:g}" if _varies(record, "threshold") else ""
        lines.setdefault(f"{NAMES[setting['objective']]}, {setting['kl']} KL{tau}", []).append(setting)
    for i, (text, settings) in enumerate(lines.items()):
        settings, colour = sorted(settings, key=lambda one: one["beta"]), COLOURS[i % len(COLOURS)]
        beta, means = [one["beta"] for one in settings], [one["mean"] for one in settings]
        value = np.array([mean[name] for mean in means], float)
        ax.plot(beta, value, color=colour, linewidth=1.8, label=text)
        if f"{name}_low" in means[0]:
            # None, where there is no interval, becomes nan, which is not filled.
            low, high = (np.array([mean[name + end] for mean in means], float) for end in ("_low", "_high"))
            ax.fill_between(beta, low, high, color=colour, alpha=0.18, linewidth=0)
        for one, x, y in zip(settings, beta, value, strict=True):
            face = "white" if one["mean"]["too_small"] else colour
            ax.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=5)
            if one["own"]:
                ax.plot(x, y, "o", color=plot_style.INK, markerfacecolor="none", markersize=11)
