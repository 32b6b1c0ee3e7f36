"""The didactic figures, drawn from the records behind them."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mara_jax.plot_style import GRID, INK, OWN, QUIET, REFERENCE, VANILLA, horizontal_grid, save, style

MISUSED = "#a3416b"  # colour of an objective that is shown as a warning
COLOURS = {
    "reverse": VANILLA,
    "forward": VANILLA,
    "mara_reverse": OWN,
    "mara_forward": OWN,
    "algorithm1_forward": MISUSED,
}
ROWS = {
    "reverse": "reverse KL",
    "forward": "forward KL",
    "mara_reverse": "MARA\nreverse KL",
    "mara_forward": "MARA\nforward KL\n(Algorithm 2)",
    "algorithm1_forward": "forward KL with\nAlgorithm 1's\nreward: not flat",
}
SIZE, DPI = (13.333, 7.5), 150  # a slide of 16 to 9


def write(record: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    """Draws a figure as PNG and SVG; equal records give equal files.

    Args:
      record: what `figures.computation.record` returns.
      path: of the PNG.

    Returns:
      That path.
    """
    with style():
        figure = Figure(figsize=SIZE, dpi=DPI)
        figure.text(0.02, 0.965, record["title"], fontsize=20, fontweight="bold", va="top")
        figure.text(0.02, 0.905, record["claim"], fontsize=12, color=QUIET, va="top")
        figure.text(0.02, 0.022, training_summary(record), fontsize=9, color=QUIET)
        drawers = {"1": _families, "3": _ratios, "iclr3": _few, "iclr4": _few}
        drawers.get(record["figure"], _many)(figure, record)
        return save(figure, path)


def training_summary(record: dict[str, Any]) -> str:
    """How a record's policies were trained, and how far from their optima they ended, in one line."""
    settings = record["settings"]
    distances = [panel["tv_to_optimum"] for panel in record["panels"]]
    source = f"{settings['batch']} samples a step" if settings["gradients"] == "sampled" else "exact gradients"
    return (
        f"{record['mode']}: Adam {settings['learning_rate']:g}, {settings['steps']} steps, {source}.  "
        f"TV: total variation from trained to exact optimum, {min(distances):.3f} to {max(distances):.3f} "
        f"over {len(distances)} trainings."
    )


def _legend(figure: Figure, colours: Sequence[str], trained: str, optimum: str, reference: str) -> None:
    swatches = tuple(Patch(facecolor=colour, alpha=0.75) for colour in colours)
    handles = [swatches, Line2D([], [], color=INK, linewidth=1.4), Patch(facecolor=REFERENCE, alpha=0.55)]
    figure.legend(
        handles, [trained, optimum, reference], handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
        loc="upper right", bbox_to_anchor=(0.99, 0.975), ncols=3, frameon=False, fontsize=11,
        handlelength=1.3 * max(1, len(colours) * 0.7), columnspacing=1.4,
    )  # fmt: skip


def _many(figure: Figure, record: dict[str, Any]) -> None:
    """A hundred outcomes: the problem on the left, a row or two of betas for each objective on the right."""
    betas = record["drawn_betas"]
    by_key = {(panel["objective"], panel["beta"]): panel for panel in record["panels"]}
    keys = list(dict.fromkeys(panel["objective"] for panel in record["panels"]))
    columns = 5
    rows = [(key, betas[i : i + columns]) for key in keys for i in range(0, len(betas), columns)]
    _legend(figure, list(dict.fromkeys(COLOURS[key] for key in keys)), "trained", "exact optimum", "reference")
    left = figure.add_gridspec(2, 1, left=0.05, right=0.19, top=0.82, bottom=0.115, hspace=0.35)
    _problem(figure.add_subplot(left[0]), figure.add_subplot(left[1]), record["problem"])
    grid = figure.add_gridspec(
        len(rows), columns, left=0.335, right=0.985, top=0.82, bottom=0.115, wspace=0.27, hspace=0.52
    )
    for i, (key, row_betas) in enumerate(rows):
        for j, beta in enumerate(row_betas):
            ax = figure.add_subplot(grid[i, j])
            _panel(ax, by_key[key, beta], record["problem"]["reference"], last=i == len(rows) - 1)
        if i == 0 or rows[i - 1][0] != key:
            span = grid[i, 0].get_position(figure)
            last = max(n for n, row in enumerate(rows) if row[0] == key)
            middle = (span.y1 + grid[last, 0].get_position(figure).y0) / 2
            name = f"vanilla\n{ROWS[key]}" if len(keys) > 2 and COLOURS[key] == VANILLA else ROWS[key]
            figure.text(
                0.3, middle, name, color=COLOURS[key], fontsize=11.5, fontweight="bold", ha="right", va="center"
            )


def _stairs(ax: Axes, value: Sequence[float], **style) -> None:
    ax.stairs(value, np.arange(len(value) + 1) - 0.5, **style)


def _problem(above: Axes, below: Axes, problem: dict[str, Any]) -> None:
    _stairs(above, problem["reward"], color=INK, linewidth=1.6)
    above.set_title("reward", loc="left", fontsize=12)
    above.set_ylim(0, 1.08)
    above.set_yticks([0, 0.5, 1])
    _stairs(below, problem["reference"], color=REFERENCE, fill=True)
    below.set_title("reference", loc="left", fontsize=12)
    below.set_ylim(0, 1.15 * max(problem["reference"]))
    below.set_xlabel("outcome")
    below.yaxis.set_major_locator(MaxNLocator(3))
    for ax in (above, below):
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xlim(-0.5, len(problem["reward"]) - 0.5)
        horizontal_grid(ax)


def _panel(ax: Axes, panel: dict[str, Any], reference: Sequence[float], *, last: bool) -> None:
    _stairs(ax, reference, color=REFERENCE, fill=True, alpha=0.55)
    colour = COLOURS[panel["objective"]]
    _stairs(ax, panel["trained"], color=colour, fill=True, alpha=0.75)
    _stairs(ax, panel["optimum"], color=INK, linewidth=1.1, baseline=None)
    ax.set_xlim(-0.5, len(reference) - 0.5)
    highest, peak = max(*panel["trained"], *reference), max(panel["optimum"])
    if peak > 2.5 * highest:  # keeps the trained policy visible; the cut-off height is written beside it
        ax.set_ylim(0, 2 * highest)
        at = int(np.argmax(panel["optimum"]))
        side = 1 if at < len(reference) / 2 else -1
        ax.annotate(
            f"\u2191 {peak:.2f}", (at, 2 * highest), (4 * side, -2), textcoords="offset points",
            ha="left" if side > 0 else "right", va="top", fontsize=8,
        )  # fmt: skip
    else:
        ax.set_ylim(0, 1.1 * max(highest, peak))
    if max(panel["trained"]) > 0.3:  # a single outcome is thinner than the line of the optimum around it
        ax.plot(int(np.argmax(panel["trained"])), max(panel["trained"]), "o", color=colour, markersize=4, zorder=3)
    ax.yaxis.set_major_locator(MaxNLocator(2))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks([0, 50, 99], ["0", "50", "99"] if last else [])
    ax.tick_params(labelsize=8, length=2)
    ax.set_title(rf"$\beta$ = {panel['beta']:g}", loc="left", fontsize=10, pad=3)
    ax.set_title(f"TV {panel['tv_to_optimum']:.2f}", loc="right", fontsize=9, color=QUIET, pad=3)


def _few(figure: Figure, record: dict[str, Any]) -> None:
    """Two or three outcomes: bars, a row for each objective, a column for each beta."""
    betas, problem = record["drawn_betas"], record["problem"]
    by_key = {(panel["objective"], panel["beta"]): panel for panel in record["panels"]}
    keys = list(dict.fromkeys(panel["objective"] for panel in record["panels"]))
    _legend(figure, [VANILLA], "trained", "exact optimum (numbers)", "reference")
    bottom, top = 0.12, 0.79
    grid = figure.add_gridspec(
        len(keys), len(betas), left=0.155, right=0.985, top=top, bottom=bottom, wspace=0.12, hspace=0.34
    )
    for i, key in enumerate(keys):
        for j, beta in enumerate(betas):
            ax = figure.add_subplot(grid[i, j])
            _bars(ax, by_key[key, beta], problem)
            if j:
                ax.tick_params(labelleft=False)
            else:
                ax.set_ylabel("probability")
        span = grid[i, 0].get_position(figure)
        figure.text(
            0.02, (span.y0 + span.y1) / 2, ROWS[key], color=COLOURS[key], fontsize=12, fontweight="bold", va="center"
        )


def _bars(ax: Axes, panel: dict[str, Any], problem: dict[str, Any]) -> None:
    at = np.arange(len(problem["reward"]))
    ax.bar(at, problem["reference"], 0.92, color=REFERENCE, alpha=0.4)
    ax.bar(at, panel["trained"], 0.62, color=COLOURS[panel["objective"]], alpha=0.8)
    ax.hlines(panel["optimum"], at - 0.46, at + 0.46, color=INK, linewidth=2)
    for x, optimum, trained, reference in zip(
        at, panel["optimum"], panel["trained"], problem["reference"], strict=True
    ):
        above = max(optimum, trained, reference)
        ax.annotate(
            _short(optimum), (x, above), (0, 4), textcoords="offset points", ha="center", fontsize=10, color=INK
        )
    ax.set_xticks(at, [f"R = {reward:g}" for reward in problem["reward"]])
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 1.1)
    ax.set_yticks([0, 0.5, 1])
    ax.set_axisbelow(True)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_title(rf"$\beta$ = {panel['beta']:g}", loc="left", fontsize=12)
    ax.set_title(f"TV {panel['tv_to_optimum']:.2f}", loc="right", fontsize=10, color=QUIET)


def _short(probability: float) -> str:
    """Three digits after the point, or a power of ten; 0 where the exponent would have three digits."""
    if probability < 1e-99:
        return "0"
    return f"{probability:.3f}" if probability >= 5e-4 else rf"$10^{{{round(np.log10(probability))}}}$"


def _ratios(figure: Figure, record: dict[str, Any]) -> None:
    """Figure 3: the exact ratio over the reward's difference, and the two outcomes themselves."""
    _legend(figure, [VANILLA], "trained", "exact optimum (numbers)", "reference")
    problem, panels = record["problem"], {panel["beta"]: panel for panel in record["panels"]}
    _ratio_lines(figure.add_axes((0.075, 0.14, 0.42, 0.65)), problem, panels)
    grid = figure.add_gridspec(2, 2, left=0.575, right=0.985, top=0.79, bottom=0.12, wspace=0.12, hspace=0.36)
    for i, panel in enumerate(record["panels"]):
        small = figure.add_subplot(grid[i // 2, i % 2])
        _bars(small, panel, problem)
        small.tick_params(labelleft=not i % 2)


def _ratio_lines(ax: Axes, problem: dict[str, Any], panels: dict[float, dict[str, Any]]) -> None:
    gap = problem["reward"][1] - problem["reward"][0]
    highest, furthest = 60.0, 0.2
    for beta in panels:
        slope = 1 / (beta * np.log(10))
        end = min(furthest, highest / slope)
        ax.plot([0, end], [0, slope * end], color=INK, linewidth=2 if beta == min(panels) else 1.2)
        if slope * end > 5:
            ax.annotate(
                rf"$\beta$ = {beta:g}", (0.93 * end, 0.93 * slope * end), (-8, 6), textcoords="offset points",
                ha="right", fontsize=12,
            )  # fmt: skip
    smallest = panels[min(panels)]
    exact = gap / smallest["beta"] / np.log(10)
    trained = np.log10(smallest["trained"][1] / smallest["trained"][0])
    ax.plot([gap], [exact], "s", color=INK, markersize=8)
    ax.annotate(
        f"{_times(exact)} times likelier", (gap, exact), (12, 0), textcoords="offset points", fontsize=13, va="center"
    )
    ax.plot([gap], [trained], "o", color=VANILLA, markersize=9, zorder=3)
    ax.annotate(
        rf"trained at $\beta$ = {smallest['beta']:g}:" + f"\n{_times(trained)} times", (gap, trained), (gap, 14),
        color=VANILLA, fontsize=13, ha="center", va="center",
        arrowprops={"arrowstyle": "-", "color": VANILLA, "shrinkB": 6},
    )  # fmt: skip
    ax.set_ylim(-1, highest)
    ax.set_xlim(0, furthest)
    ax.set_xticks([0, 0.05, 0.1, 0.15, 0.2], ["0", "0.05", "0.1", "0.15", "0.2"])
    ax.set_xlabel("difference in reward")
    ax.set_ylabel("ratio of probabilities, powers of ten")
    ax.set_axisbelow(True)
    ax.grid(color=GRID, linewidth=0.8)


def _times(decades: float) -> str:
    """10 to that power, with three digits, or whole where it is small."""
    if decades < 3:
        return f"{10**decades:.0f}"
    return rf"${10 ** (decades % 1):.2f}\times10^{{{int(decades)}}}$"


def _families(figure: Figure, record: dict[str, Any]) -> None:
    """Figure 1: the target in grey, each family's fit over it."""
    x, target = np.array(record["problem"]["x"]), np.array(record["problem"]["target"])
    spacing = x[1] - x[0]
    _legend(figure, [VANILLA, OWN], "fit", "best of its family", "target")
    grid = figure.add_gridspec(2, 2, left=0.165, right=0.985, top=0.79, bottom=0.13, wspace=0.08, hspace=0.2)
    words = {
        ("gaussian", "reverse"): "seeks one mode",
        ("gaussian", "forward"): "covers both",
        ("categorical", "reverse"): "matches",
        ("categorical", "forward"): "matches",
    }
    for panel in record["panels"]:
        row, column = int(panel["direction"] == "forward"), int(panel["family"] == "categorical")
        ax = figure.add_subplot(grid[row, column])
        colour = OWN if column else VANILLA
        ax.fill_between(x, target / spacing, color=REFERENCE, alpha=0.55, linewidth=0)
        ax.fill_between(x, np.array(panel["trained"]) / spacing, color=colour, alpha=0.45, linewidth=0)
        ax.plot(x, np.array(panel["trained"]) / spacing, color=colour, linewidth=2)
        ax.plot(x, np.array(panel["optimum"]) / spacing, color=INK, linewidth=1.2)
        ax.set_xlim(-8, 8)
        ax.set_ylim(0, 0.75)
        ax.set_yticks([0, 0.25, 0.5])
        ax.tick_params(labelleft=not column, labelbottom=bool(row))
        ax.text(0.97, 0.92, words[panel["family"], panel["direction"]], transform=ax.transAxes, ha="right", va="top",
                fontsize=14, fontweight="bold", color=colour)  # fmt: skip
        text = f"TV to the target {panel['tv_to_target']:.2f}"
        if not column:
            text += f"\nto the best Gaussian {panel['tv_to_optimum']:.2f}"
        ax.text(0.97, 0.78, text, transform=ax.transAxes, ha="right", va="top", fontsize=10, color=QUIET)
        if not row:
            ax.set_title("free categorical" if column else "two-parameter Gaussian", fontsize=14)
        if not column:
            ax.set_ylabel("density")
        if row:
            ax.set_xlabel("x")
    for row, name in enumerate(("reverse KL", "forward KL")):
        span = grid[row, 0].get_position(figure)
        figure.text(0.02, (span.y0 + span.y1) / 2, name, fontsize=13, fontweight="bold", va="center")
