"""What a prior's training shows: the curve of validity, and the table of statistics beside published ones."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mara_jax import plot_style
from mara_jax.prior.quality import MEANINGS
from mara_jax.tasks.chemistry import moses
from mara_jax.train.tables import NumberTable

SHOWN = ("CharRNN", "VAE", "JTN-VAE")  # of the published priors


def draw_curves(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """Draws validity and held-out loss against the tokens trained on.

    Args:
      rows: of evaluations.jsonl.
    """
    from matplotlib.figure import Figure

    with plot_style.style():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        tokens = [row["tokens/trained"] / 1e6 for row in rows]
        for name, colour in (("valid", plot_style.OWN), ("unique@1k", plot_style.VANILLA), ("novel", plot_style.QUIET)):
            left.plot(tokens, [row[name] for row in rows], color=colour, marker="o", markersize=3, label=name)
        left.set(xlabel="million tokens trained on", ylabel="share of molecules", ylim=(0, 1.02), xlim=(0, None))
        left.legend(frameon=False)
        right.plot(tokens, [row["loss/held_out"] for row in rows], color=plot_style.OWN, marker="o", markersize=3)
        right.set(xlabel="million tokens trained on", ylabel="held-out loss (nats a molecule)", xlim=(0, None))
        for axes in (left, right):
            plot_style.horizontal_grid(axes)
        return plot_style.save(figure, path)


def table(measured: Mapping[str, float], source: str) -> NumberTable:
    """The statistics with their meanings; of a prior trained on MOSES, beside the published ones."""
    published = SHOWN if source == "moses" else ()
    shown = NumberTable.with_headers("statistic", "", "this prior", *published, texts=2)
    for name in sorted(measured, key=_order):
        what, _, of = name.partition("/")
        others = [moses.PUBLISHED[prior].get(name) for prior in published]
        cells = [f"{value:.4f}" if value is not None else "" for value in (measured[name], *others)]
        shown.add_row(name, MEANINGS[what].format(f"the set {of}"), *cells)
    return shown


def _order(name: str) -> tuple[str, int]:
    what, _, of = name.partition("/")
    return of, list(MEANINGS).index(what)
