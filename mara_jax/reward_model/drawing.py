"""The calibration plot of a reward model."""

import pathlib
from typing import Any

from matplotlib.figure import Figure

from mara_jax.plot_style import OWN, QUIET, REFERENCE, horizontal_grid, save, style


def draw(path: pathlib.Path, calibration: dict[str, Any], title: str) -> pathlib.Path:
    """Predicted probabilities against observed shares with Wilson intervals, above the count of each bin.

    Args:
      path: of the PNG, beside which an SVG is written; calibration: as of `quality.calibration`.

    Returns:
      That path.
    """
    bins = calibration["bins"]
    x, y = ([one[name] for one in bins] for name in ("predicted", "observed"))
    with style():
        figure = Figure(figsize=(5.2, 5.6), dpi=130)
        shares, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        shares.plot([0, 1], [0, 1], color=REFERENCE, linewidth=1, linestyle="--")
        gaps = [
            [one["observed"] - min(one["low"], one["observed"]) for one in bins],
            [max(one["high"], one["observed"]) - one["observed"] for one in bins],
        ]
        shares.errorbar(x, y, yerr=gaps, color=OWN, marker="o", markersize=4.5, linewidth=1.2, capsize=2)
        shares.set_ylabel("observed share")
        shares.set_ylim(-0.03, 1.03)
        shares.set_title(title, loc="left", fontsize=11)
        counts.bar(x, [one["count"] for one in bins], width=0.06, color=OWN, alpha=0.5)
        for place, one in zip(x, bins, strict=True):
            counts.annotate(str(one["count"]), (place, one["count"]), ha="center", va="bottom", fontsize=8, color=QUIET)
        counts.margins(y=0.25)
        counts.set_ylabel("pairs")
        counts.set_xlabel("predicted P(first of the two is the chosen one)")
        counts.set_xlim(-0.03, 1.03)
        for ax in (shares, counts):
            horizontal_grid(ax)
        figure.tight_layout()
        return save(figure, path)
