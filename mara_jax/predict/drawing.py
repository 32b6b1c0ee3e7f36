"""The report of a prediction: its table, notes, sentence and figure, from the record of `prediction.predict`."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.markup import escape

from mara_jax import plot_style
from mara_jax.train import strict_json, workdir
from mara_jax.train.tables import NumberTable

NAMES = {"vanilla": "vanilla", "answers": "MARA over answers", "strings": "MARA over strings"}
COLOURS = ("#0f6e84", "#d97706", "#7c3aed", "#15803d", "#be185d", "#475569")  # distinguishable in grey as well
SHORT = {"vanilla": "vanilla", "answers": "MARA answers", "strings": "MARA strings"}
MOST_LINES = 6  # answers with a line in the figure
MOST_COLUMNS = 4  # answers with a column in the table, which then fits into 80 characters


def show(record: dict[str, Any], console: Console) -> None:
    """Prints the reference policy's numbers, the table at the configured beta, notes, and the verdict."""
    reference, settings = record["draws"], record["settings"]
    if reference["exact"]:
        console.print(f"every one of {reference['count']} outcomes, with its exact probability under the reference")
    else:
        console.print(
            f"reference: {reference['count']} samples, {reference['valid']:.1%} with an answer, "
            f"{reference['good']:.1%} good (reward >= {settings['threshold']:g}), "
            f"mean reward {reference['mean_reward']:.3f}",
            markup=False,
        )
    console.print(table(record))
    for line in notes(record):
        console.print(line, markup=False)
    console.print(record["verdict"], style="bold", markup=False)


def table(record: dict[str, Any]) -> NumberTable:
    """Each objective's optimum at the configured beta: shares of the answers with intervals, and how many there are."""
    settings, leading = record["settings"], _leading(record, MOST_COLUMNS)
    few = "" if len(leading) == len(record["answers"]) else f", {len(leading)} of {len(record['answers'])}"
    title = f"shares of the answers{few} at the optimum, beta {settings['beta']:g}"
    answers = (escape(f'"{record["answers"][a]}"') for a in leading)
    number_table = NumberTable.with_headers("", *answers, "none", "effective", lines=True, title=title)
    if not record["draws"]["exact"]:
        counts = np.array(record["draws"]["counts"])
        share = counts / max(counts.sum(), 1)
        effective = np.exp(-sum(s * np.log(s) for s in share if s > 0))
        cells = [f"{share[a]:.3f}" for a in leading]
        number_table.add_row("reference", *cells, f"{1 - record['draws']['valid']:.3f}", f"{effective:.2f}")
    for direction in ("reverse", "forward"):
        for name, objective in record["objectives"][direction].items():
            own = (name, direction) == (settings["objective"], settings["kl"])
            number_table.add_row(
                f"{'> ' if own else '  '}{SHORT[name]}, {direction}",
                *_cells(objective, leading),
                style="bold" if own else None,
            )
    number_table.caption = "none: no answer; effective: number of answers, exp of the entropy of the shares" + (
        "" if record["draws"]["exact"] else "\nbelow each number: its 95 % bootstrap interval"
    )
    return number_table


def _cells(objective: dict[str, Any] | None, leading: list[int]) -> list[str]:
    if not _trusted(objective):
        return ["?"] * (len(leading) + 2)
    assert objective is not None
    at = objective["at_own"]
    cells = [_cell(at["share"][a], at["share_low"][a], at["share_high"][a]) for a in leading]
    none = at["mass"][-1]
    small = f"{none:.3f}" if none >= 5e-4 or none == 0 else f"{none:.0e}"
    return [*cells, small, _cell(at["number"], at["number_low"], at["number_high"], ".2f")]


def _cell(value: float, low: float, high: float, form: str = ".3f") -> str:
    short = ".2f" if form == ".3f" else ".1f"
    ends = "" if format(low, form) == format(high, form) else f"\n[dim]{low:{short}}-{high:{short}}[/dim]"
    return f"{value:{form}}{ends}"


def notes(record: dict[str, Any]) -> list[str]:
    """Lines about flips and collapsed stretches, and about the rows of the table without numbers."""
    lines = []
    kl = record["settings"]["kl"]
    for name in dict.fromkeys(("vanilla", record["settings"]["objective"])):
        objective = record["objectives"][kl][name]
        if not _trusted(objective):
            continue
        for stretch in objective["collapsed"]:
            lines.append(f'{NAMES[name]}, {kl} KL: "{stretch["answer"]}" has 95 % or more {_stretch(stretch)}')
        for flip in [f for f in objective["flips"] if f["leads"]][:5]:
            interval = (
                "" if record["draws"]["exact"] or flip["low"] is None else f" [{flip['low']:.3g}, {flip['high']:.3g}]"
            )
            lines.append(
                f'{NAMES[name]}, {kl} KL: below beta {flip["beta"]:.3g}{interval} "{flip["below"]}" leads, '
                f'above it "{flip["above"]}"'
            )
    strings = record["objectives"][kl]["strings"]
    if strings is None:
        lines.append("?: MARA over strings needs ref_logp of every sample")
    elif not _trusted(strings):
        least = min(strings["trust"]["effective_draws"])
        lines.append(
            f"?: MARA over strings counts strings by weights 1 / ref(y); an answer's effective sample size is "
            f"{least:.1f}, and {strings['trust']['needed']} are needed"
        )
    elif strings["trust"]["known"]:
        lines.append("MARA over strings: every answer has equally many good strings here, so equal shares are exact")
    return lines


def _stretch(stretch: dict[str, Any]) -> str:
    def end(name: str) -> str:
        interval = stretch[f"{name}_interval"]
        known = interval and interval[0] is not None and interval[0] != interval[1]
        return f"{stretch[name]:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if known else "")

    if stretch["from"] is None and stretch["to"] is None:
        return "at every beta"
    if stretch["from"] is None:
        return f"below beta {end('to')}"
    return f"above beta {end('from')}" + (f" up to {end('to')}" if stretch["to"] else "")


def _trusted(objective: dict[str, Any] | None) -> bool:
    trust = (objective or {}).get("trust")
    return objective is not None and (trust is None or trust["known"] or trust["useful"])


def _leading(record: dict[str, Any], most: int) -> list[int]:
    """All answers if they are few, else those of the largest shares at the configured beta, here or in vanilla RL."""
    if len(record["answers"]) <= most:
        return list(range(len(record["answers"])))
    settings = record["settings"]
    shares = [
        objective["at_own"]["share"]
        for name, objective in record["objectives"][settings["kl"]].items()
        if _trusted(objective) and name in ("vanilla", settings["objective"])
    ]
    return sorted(np.argsort(-np.max(shares, axis=0), kind="stable")[:most].tolist())


def to_json(record: dict[str, Any], indent: int | None = None) -> str:
    """The numbers as strict JSON, which has no NaN and no infinity: null stands for them."""
    return strict_json.text(record, indent)


def write(record: dict[str, Any], out: Path) -> Path:
    """Writes prediction.json, prediction.png and prediction.svg.

    Args:
      record: the prediction.
      out: a folder, created if it does not exist.

    Returns:
      The path of the PNG.
    """
    with plot_style.style():
        figure = draw(record)
        out.mkdir(parents=True, exist_ok=True)
        path = plot_style.save(figure, out / "prediction.png")
    workdir.replace(path.with_suffix(".json"), to_json(record, indent=1) + "\n")
    return path


def draw(record: dict[str, Any]) -> Figure:
    """Answer shares against beta for vanilla under both KLs and MARA over answers, and the effective number."""
    settings = record["settings"]
    mara = "answers" if "answers" in record["objectives"][settings["kl"]] else "strings"
    panels = [("vanilla", "reverse"), ("vanilla", "forward"), (mara, settings["kl"])]
    figure = Figure(figsize=(12.0, 7.4), dpi=150)
    axes = figure.subplots(2, 2, sharex=True)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.82, bottom=0.13, hspace=0.22, wspace=0.16)
    for ax, (name, direction) in zip(axes.flat, panels, strict=False):
        _shares(ax, record, name, direction)
    _numbers(axes[1, 1], record)
    for ax in axes.flat:
        ax.set_xscale("log")
        ax.set_xlim(record["betas"][0], record["betas"][-1])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.axvline(settings["beta"], color=plot_style.INK, linewidth=1.2, linestyle=(0, (4, 2)))
        plot_style.horizontal_grid(ax)
    for ax in axes[1]:
        ax.set_xlabel("beta (dashed: as configured)")
    handles = {
        text: line for ax in axes.flat[2::-1] for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=10.5)
    title = f"predicted optimum of {NAMES[settings['objective']]}, {settings['kl']} KL, $\\beta$ = {settings['beta']:g}"
    figure.text(0.012, 0.975, title, fontsize=16, fontweight="bold", va="top")
    figure.text(0.012, 0.925, textwrap.fill(record["verdict"], 150), fontsize=10.5, color=plot_style.QUIET, va="top")
    return figure


def _shares(ax: Axes, record: dict[str, Any], name: str, direction: str) -> None:
    objective, beta = record["objectives"][direction][name], record["betas"]
    curves = {key: np.array(value) for key, value in objective["curves"].items()}
    leading = _leading(record, MOST_LINES)
    for i, a in enumerate(leading):
        colour = COLOURS[i % len(COLOURS)]
        # Under MARA the lines coincide: the lower ones are drawn wider, so that all are visible.
        width = 2.0 if name == "vanilla" else 2.0 + 2.0 * (len(leading) - 1 - i)
        low, high = curves["share_low"][:, a], curves["share_high"][:, a]
        ax.fill_between(beta, low, high, color=colour, alpha=0.18, linewidth=0)
        ax.plot(beta, curves["share"][:, a], color=colour, linewidth=width, label=f'"{record["answers"][a]}"')
    ax.axhline(record["collapsed_at"], color=plot_style.QUIET, linewidth=0.9, linestyle=":")
    marked = [(flip["beta"], flip["share"]) for flip in objective["flips"] if flip["leads"]][:6]
    if marked:
        ax.plot(*zip(*marked, strict=True), "o", color=plot_style.INK, markersize=6, label="leader changes", zorder=4)
    ax.set_ylim(-0.02, 1.04)
    ax.set_ylabel("share of the answers")
    ax.set_title(f"{NAMES[name]}, {direction} KL", loc="left", fontsize=11.5)


def _numbers(ax: Axes, record: dict[str, Any]) -> None:
    kl, beta = record["settings"]["kl"], record["betas"]
    colours = {"vanilla": plot_style.VANILLA, "answers": plot_style.OWN, "strings": "#7c3aed"}
    lines = {"vanilla": "-", "answers": "-", "strings": "--"}
    for name, objective in record["objectives"][kl].items():
        if not _trusted(objective):
            continue
        curves = {key: np.array(value) for key, value in objective["curves"].items()}
        ax.fill_between(beta, curves["number_low"], curves["number_high"], color=colours[name], alpha=0.18, linewidth=0)
        ax.plot(beta, curves["number"], color=colours[name], linewidth=2, linestyle=lines[name], label=NAMES[name])
    ax.set_ylim(0.9, 1.06 * max(ax.get_ylim()[1], 1.5))
    ax.set_ylabel("effective number of answers")
    ax.set_title(f"how many answers are left, {kl} KL", loc="left", fontsize=11.5)
    ax.legend(frameon=False, fontsize=9.5, loc="best")
