"""The figures that `evaluate run` and `evaluate compare` draw."""

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mara_jax.evaluate import models
from mara_jax.plot_style import GRID, OWN, REFERENCE, VANILLA, horizontal_grid, save, style

FILE = "evaluation.png"


def draw(path: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """pass@k and majority@k by k with their intervals, and reward against effective answers, a dot for each prompt.

    Args:
      path: of the PNG, beside which an SVG is written; result: what evaluation.json holds.

    Returns:
      That path.
    """
    with style():
        figure = Figure(figsize=(11.0, 4.4), dpi=130)
        by_k, prompts = figure.subplots(1, 2)
        for kind, colour, line in (("pass", OWN, "-"), ("majority", VANILLA, "--")):  # dashed, as they may be equal
            _curve(by_k, result, kind, colour, line)
        by_k.set_xscale("log", base=2)
        by_k.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        by_k.set_ylim(-0.03, 1.03)
        by_k.set_xlabel("k completions")
        by_k.set_title("mean over prompts", loc="left", fontsize=11)
        by_k.legend(frameon=False, fontsize=9)
        effective = [row["answers/effective"] for row in result["prompts"]]
        prompts.scatter(
            effective, [row["reward"] for row in result["prompts"]], s=22, color=OWN, alpha=0.5, linewidths=0
        )
        prompts.set_xlim(left=0, right=1.05 * max(1.0, *effective))
        prompts.set_xlabel("effective number of answers")
        prompts.set_ylabel("mean reward")
        prompts.set_title("a dot for each prompt", loc="left", fontsize=11)
        for ax in (by_k, prompts):
            horizontal_grid(ax)
        figure.tight_layout()
        return save(figure, path)


def pareto(path: pathlib.Path, evaluated: Sequence[models.Model]) -> pathlib.Path:
    """Mean reward against diversity, a dot a model with its intervals as bars; the Pareto-best are connected.

    Args:
      path: of the PNG, beside which an SVG is written; evaluated: the models.

    Returns:
      That path.
    """
    diversity, best = models.diversity_of(evaluated), models.front(evaluated)
    with style():
        figure = Figure(figsize=(7.6, 5.0), dpi=130)
        ax = figure.subplots()
        points = {}
        for one in evaluated:
            x, y = (one.result["metrics"][name] for name in (diversity, models.QUALITY))
            errors = [_reach(one.result, name) for name in (diversity, models.QUALITY)]
            colour = OWN if one.name in best else REFERENCE
            ax.errorbar(
                [x], [y], xerr=errors[0], yerr=errors[1], fmt="o", markersize=7, color=colour, elinewidth=1.1, capsize=2
            )
            ax.annotate(one.name, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=9)
            points[one.name] = x, y
        x, y = zip(*sorted(points[name] for name in best), strict=True)
        ax.plot(x, y, color=OWN, linewidth=1.2, zorder=0, label="Pareto-best")
        ax.set_xlabel({models.DIVERSITY: "effective number of a prompt's answers"}.get(diversity, diversity))
        ax.set_ylabel("mean reward")
        ax.set_title("means over prompts with 95 % intervals", loc="left", fontsize=11)
        ax.grid(axis="x", color=GRID, linewidth=0.8)
        horizontal_grid(ax)
        ax.legend(frameon=False, fontsize=9, loc="upper right")
        figure.tight_layout()
        return save(figure, path)


def _reach(result: dict[str, Any], name: str) -> list[list[float]] | None:
    """How far an interval reaches below and above the mean; None for a single prompt."""
    if name not in result["intervals"]:
        return None
    (low, high), value = result["intervals"][name], result["metrics"][name]
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _curve(ax: Axes, result: dict[str, Any], kind: str, colour: str, line: str) -> None:
    """One measure by k, with a band where there are intervals."""
    names = [name for name in result["metrics"] if name.startswith(f"{kind}@")]
    ks = [int(name.split("@")[1]) for name in names]
    value_k = [result["metrics"][name] for name in names]
    ax.plot(ks, value_k, line, color=colour, marker="o", markersize=3.5, label=f"{kind}@k")
    if result["intervals"]:
        low, high = zip(*(result["intervals"][name] for name in names), strict=True)
        ax.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
