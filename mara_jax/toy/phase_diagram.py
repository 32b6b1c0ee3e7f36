"""The phase diagram of a study: where the good outcomes all survive, as trained and as the optimum has it."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mara_jax.core import diversity, targets
from mara_jax.plot_style import INK, OWN, QUIET, VANILLA, save, style

SHADES = LinearSegmentedColormap.from_list("coverage", ["#f6f1e7", "#9cc9cf", OWN, "#062e38"])


def diagram(workdir: str | os.PathLike) -> Path:
    """Draws coverage over beta and reward gap (over beta alone where there is one gap), a row a KL and estimator.

    Coverage is exp(entropy of the policy over the good outcomes) over their number: 1 where all are equally likely.
    Means over seeds, at the first threshold. The left panel of a method shows the trained policies, the right one its
    optimum. The dashed line is where the optimum of reverse KL turns from one peak to the other (Eq. 11).

    Args:
      workdir: folder with sweep.npz and sweep.json.

    Returns:
      The path of phase.png in it; phase.svg lies beside it.
    """
    workdir = Path(workdir)
    axes = json.loads((workdir / "sweep.json").read_text())
    with np.load(workdir / "sweep.npz") as arrays:
        trained_vgb = arrays["coverage"][:, :, :, 0].mean(-1)
        good_ga = np.asarray(axes["reward"]) >= axes["thresholds"][0]
        optimum_vgb = diversity.coverage(arrays["target_logp_a"][:, :, :, 0, 0], good_ga[:, None])
    with style():
        draw = _maps if len(axes["gaps"]) > 1 else _lines
        figure = draw(axes, trained_vgb, optimum_vgb)
        return save(figure, workdir / "phase.png")


def summary(trained: dict[str, np.ndarray], axes: dict[str, Any]) -> list[str]:
    """One line a variant: mean coverage, and total variation to its optimum and to uniform over good outcomes."""
    lines = []
    for i, variant in enumerate(axes["variants"]):
        to_optimum = trained["distance_to_target"][i]
        known = "" if np.all(np.isnan(to_optimum)) else f" to the optimum {np.nanmean(to_optimum):.3f},"
        coverage, to_uniform = (np.nanmean(trained[name][i]) for name in ("coverage", "distance_to_uniform"))
        lines.append(
            f"{_name(variant)}: mean coverage of the good outcomes {coverage:.2f}, total variation{known} to uniform "
            f"over the good ones {to_uniform:.3f}"
        )
        lost = int(np.isnan(trained["distance_to_uniform"][i]).sum())
        if lost:
            lines.append(
                f"WARNING: {_name(variant)}: {lost} of {trained['distance_to_uniform'][i].size} runs ended in numbers "
                "that are not finite, and are left out of these means: lower toy.learning_rate"
            )
    return lines


def _name(variant: dict[str, str]) -> str:
    estimator = "" if variant["estimator"] == "auto" else f" ({variant['estimator'].replace('_', ' ')})"
    return f"{_title(variant)}{estimator}"


def _title(variant: dict[str, str]) -> str:
    """The method and its KL; the method alone where it has a KL of its own, whose estimator is "auto"."""
    method = "MARA" if variant["method"] == "mara" else variant["method"].replace("_", " ")
    return method if variant["estimator"] == "auto" else f"{method}, {variant['kl']} KL"


def _maps(axes: dict[str, Any], trained_vgb: np.ndarray, optimum_vgb: np.ndarray) -> Figure:
    """A row for each KL and estimator, two panels a method; a method with a KL of its own is in the first row."""
    named = [(v["kl"], v["estimator"]) for v in axes["variants"] if v["estimator"] != "auto"]
    rows = list(dict.fromkeys(named)) or [("reverse", "auto")]
    methods = list(dict.fromkeys(v["method"] for v in axes["variants"]))
    height = 1.15 + 2.45 * len(rows)
    figure = Figure(figsize=(2.0 + 2.75 * 2 * len(methods), height), dpi=150)
    panels = figure.subplots(len(rows), 2 * len(methods), sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(left=0.075, right=0.9, top=1 - 0.95 / height, bottom=0.55 / height, hspace=0.28, wspace=0.08)
    for panel in panels.flat:
        panel.set_visible(False)
    image, turns = None, False
    for i, variant in enumerate(axes["variants"]):
        row = 0 if variant["estimator"] == "auto" else rows.index((variant["kl"], variant["estimator"]))
        column = 2 * methods.index(variant["method"])
        for offset, (word, value_vgb) in enumerate((("trained", trained_vgb), ("optimum", optimum_vgb))):
            panel = panels[row, column + offset]
            panel.set_visible(True)
            grid = edges(axes["gaps"]), np.exp(edges(np.log(axes["betas"])))
            image = panel.pcolormesh(*grid, value_vgb[i].T, cmap=SHADES, vmin=0, vmax=1, rasterized=True)
            panel.set_yscale("log")
            unknown = " (not known)" if np.all(np.isnan(value_vgb[i])) else ""
            panel.set_title(f"{_title(variant)}: {word}{unknown}", loc="left", fontsize=10)
            if variant["method"] == "vanilla" and variant["kl"] == "reverse":
                turns |= _turning_line(panel, axes)
    for panel in panels[:, 0]:
        panel.set_ylabel("$\\beta$")
    for panel in panels[-1]:
        panel.set_xlabel("reward gap between the peaks")
    assert image is not None
    bar = figure.colorbar(image, cax=figure.add_axes((0.915, 0.55 / height, 0.012, 1 - 1.5 / height)))
    bar.set_label("coverage of the good outcomes")
    _titles(figure, axes, height, "; dashed: the optimum turns from one peak to the other" if turns else "")
    return figure


def edges(value: Any) -> np.ndarray:
    """Cell edges half-way between neighbouring values, and as far beyond the first and the last."""
    value = np.asarray(value, np.float64)
    if len(value) == 1:
        return value[0] + np.array([-0.5, 0.5])
    middle = (value[1:] + value[:-1]) / 2
    return np.concatenate([[2 * value[0] - middle[0]], middle, [2 * value[-1] - middle[-1]]])


def _turning_line(panel: Axes, axes: dict[str, Any]) -> bool:
    """Draws the beta at which the optimum gives both peaks' best outcomes equal mass; returns whether it is visible."""
    ref_ga, reward_ga = np.asarray(axes["ref_logp"]), np.asarray(axes["reward"])
    half = ref_ga.shape[1] // 2
    rows = np.arange(len(ref_ga))
    left, right = reward_ga[:, :half].argmax(1), half + reward_ga[:, half:].argmax(1)
    pairs = (table[rows, at] for at in (left, right) for table in (ref_ga, reward_ga))
    tie = np.asarray(targets.tie_beta(*map(jnp.asarray, pairs)), float)
    low, high = panel.get_ylim()
    visible = (tie > low) & (tie < high)
    if visible.sum() > 1:
        panel.plot(np.asarray(axes["gaps"])[visible], tie[visible], color=VANILLA, linestyle="--", linewidth=1.6)
    return bool(visible.sum() > 1)


def _lines(axes: dict[str, Any], trained_vgb: np.ndarray, optimum_vgb: np.ndarray) -> Figure:
    """One gap: coverage against beta, a line a variant; the optimum dashed."""
    figure = Figure(figsize=(8.5, 5.2), dpi=150)
    panel = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.97, top=0.82, bottom=0.11)
    colours = matplotlib.colormaps["tab10"]
    for i, variant in enumerate(axes["variants"]):
        colour = {"vanilla": VANILLA, "mara": OWN}.get(variant["method"], colours(i)) if i < 2 else colours(i)
        panel.plot(axes["betas"], trained_vgb[i, 0], color=colour, linewidth=2, marker="o", label=_name(variant))
        panel.plot(axes["betas"], optimum_vgb[i, 0], color=colour, linewidth=1.4, linestyle="--")
    panel.set_xscale("log")
    panel.set_ylim(0, 1.05)
    panel.set_xlabel("$\\beta$")
    panel.set_ylabel("coverage of the good outcomes (optimum dashed)")
    panel.legend(frameon=False, fontsize=9)
    _titles(figure, axes, 5.2, "")
    return figure


def _titles(figure: Figure, axes: dict[str, Any], height: float, more: str) -> None:
    title = "Which good outcomes survive training"
    figure.text(0.012, 1 - 0.12 / height, title, fontsize=15, fontweight="bold", va="top")
    number = len(axes["seeds"])
    seeds = f"mean of {number} seed{'s' * (number > 1)}"
    text = f"{axes['problem']}: 100 outcomes, {axes['steps']} steps, {seeds}; 1 = all equally likely{more}"
    figure.text(0.012, 1 - 0.42 / height, text, fontsize=9.5, color=QUIET, va="top")
    figure.patch.set_facecolor("white")
    for panel in figure.axes:
        panel.tick_params(colors=INK)
