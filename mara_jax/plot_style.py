"""How every figure looks: colours, matplotlib's settings, and files that are equal for equal numbers."""

import contextlib
import pathlib

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, QUIET, GRID = "#222222", "#6b7280", "#e5e7eb"
REFERENCE, VANILLA, OWN = "#9ca3af", "#d97706", "#0f6e84"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 1.2,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mara_jax",  # the same run gives the same file
}


def style() -> contextlib.AbstractContextManager:
    """The settings in which figures are drawn and saved."""
    return matplotlib.rc_context(STYLE)  # pyright: ignore[reportArgumentType]


def save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    """Writes a figure as PNG, and as SVG beside it, without dates, so that equal figures give equal files.

    Args:
      figure: what is written; call it within `style`.
      path: of the PNG.

    Returns:
      That path.
    """
    figure.savefig(path, format="png", metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), format="svg", metadata={"Date": None})
    return path


def horizontal_grid(ax: Axes) -> None:
    """Quiet horizontal lines behind what is drawn."""
    ax.set_axisbelow(True)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
