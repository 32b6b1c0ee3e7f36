"""The figure of one run of the 100-outcome problem, drawn from what it wrote."""

import json
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mara_jax.config import Algorithm
from mara_jax.core import method_rules
from mara_jax.plot_style import INK, OWN, QUIET, REFERENCE, VANILLA, horizontal_grid, save, style


def save_figure(workdir: str | os.PathLike) -> Path:
    """Draws a toy run: reference and rewards above; the trained policy beside its objective's optimum below.

    Args:
      workdir: the run's folder, with config.json and result.json.

    Returns:
      The path of figure.png in it; figure.svg lies beside it.
    """
    workdir = Path(workdir)
    config, result = (json.loads((workdir / name).read_text()) for name in ("config.json", "result.json"))
    algorithm, outcome = config["algorithm"], np.arange(len(result["reward"]))
    with style():
        figure = Figure(figsize=(9.0, 6.2), dpi=150)
        problem, trained = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.6])
        figure.subplots_adjust(left=0.09, right=0.92, top=0.87, bottom=0.09, hspace=0.22)
        problem.bar(outcome, result["reference"], 1.0, color=REFERENCE, label="reference")
        problem.set_ylabel("probability")
        rewards = problem.twinx()
        rewards.step(outcome, result["reward"], where="mid", color=INK, linewidth=1.6, label="reward")
        rewards.set_ylim(0, 1.12)
        rewards.spines["right"].set_visible(True)
        rewards.set_ylabel("reward")
        handles = [*problem.get_legend_handles_labels()[0], *rewards.get_legend_handles_labels()[0]]
        problem.legend(handles=handles, frameon=False, loc="upper right", fontsize=9)
        colour = VANILLA if algorithm["method"] == "vanilla" else OWN
        trained.bar(outcome, result["policy"], 1.0, color=colour, alpha=0.75, label="trained policy")
        if result["optimum"] is not None:
            trained.step(outcome, result["optimum"], where="mid", color=INK, linewidth=1.6, label="exact optimum")
        trained.set_xlabel("outcome")
        trained.set_ylabel("probability")
        trained.legend(frameon=False, loc="upper right", fontsize=9)
        horizontal_grid(trained)
        name = "MARA" if algorithm["method"] == "mara" else algorithm["method"].replace("_", " ")
        kl = f", {algorithm['kl']} KL" if method_rules.rows(Algorithm(**algorithm))[1].placements else ""
        title = f"{name}{kl}, $\\beta$ = {algorithm['beta']:g}"
        figure.text(0.02, 0.96, title, fontsize=15, fontweight="bold", va="top")
        known = result["optimum"] is not None
        distances = "total variation "
        distances += f"to the optimum {result['distance_to_optimum']:.3f}, " if known else ""
        distances += f"to uniform over the good outcomes {result['distance_to_uniform']:.3f}"
        figure.text(0.02, 0.912, distances, fontsize=10, color=QUIET, va="top")
        return save(figure, workdir / "figure.png")
