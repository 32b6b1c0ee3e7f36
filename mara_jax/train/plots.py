"""The figure of a run, drawn from what it wrote."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mara_jax.core import diversity
from mara_jax.plot_style import GRID, INK, OWN, QUIET, REFERENCE, VANILLA, horizontal_grid, save, style
from mara_jax.train import report


def final_figure(record: report.Record) -> Path:
    """Draws a run whose prompts share a set of answers: where its completions end beside the predicted optima.

    Left: probability of each answer, and of none, for the reference (measured), the vanilla optimum and this
    objective's optimum (predicted), and what the run reached. Right: valid share, answer entropy, and KL to
    the reference, step by step.

    Returns:
      The path of figure.png in the run's folder; figure.svg lies beside it.
    """
    with style():
        figure = Figure(figsize=(12.0, 6.6), dpi=150)
        grid = figure.add_gridspec(
            3,
            2,
            width_ratios=[1.2, 1.0],
            left=0.065,
            right=0.985,
            top=0.77,
            bottom=0.085,
            hspace=0.36,
            wspace=0.17,
        )
        _bars(figure.add_subplot(grid[:, 0]), record)
        valid = figure.add_subplot(grid[0, 1])
        entropy, kl = (figure.add_subplot(grid[i, 1], sharex=valid) for i in (1, 2))
        _over_steps(valid, entropy, kl, record)
        figure.text(0.012, 0.965, _headline(record), fontsize=16, fontweight="bold", va="top")
        objective = textwrap.fill(record.reference["objective"], 150)
        figure.text(0.012, 0.915, objective, fontsize=10, color=QUIET, va="top")
        return save(figure, record.workdir / "figure.png")


def _headline(record: report.Record) -> str:
    before, after = record.measured_reference, record.reached
    name = f"{record.method}, $\\beta$ = {record.config['algorithm']['beta']:g}"
    if after is None:
        return f"{name}: no step yet"
    return (
        f"{name}: answer entropy {before.entropy_bits:.2f} \u2192 {after.entropy_bits:.2f} bits, "
        f"valid {before.valid:.0%} \u2192 {after.valid:.0%}"
    )


def _bars(ax: Axes, record: report.Record) -> None:
    """Grouped bars: solid where measured, hatched where predicted."""
    rows = [(record.measured_reference, REFERENCE), (record.optimum("vanilla"), VANILLA)]
    if record.optimum_of_own == "mara":
        rows.append((record.own_optimum, OWN))
    rows.append((record.reached, VANILLA if record.algorithm.method == "vanilla" else OWN))
    rows = [(outcome, colour) for outcome, colour in rows if outcome is not None]
    group = np.arange(len(record.answers) + 1)
    width = 0.84 / len(rows)
    for i, (outcome, colour) in enumerate(rows):
        x = group + (i - (len(rows) - 1) / 2) * width
        predicted = outcome.intervals is None
        kind = "predicted" if predicted else "measured"
        face = {"facecolor": "white", "edgecolor": colour, "hatch": "////"} if predicted else {"facecolor": colour}
        ax.bar(x, outcome.shares, 0.9 * width, label=f"{outcome.name} ({kind})", **face)
        top = outcome.shares
        if outcome.intervals is not None:
            ends = np.array(outcome.intervals)
            error = np.abs(ends.T - outcome.shares)
            ax.errorbar(x, outcome.shares, error, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
            top = ends[:, 1]
        for at, height, share in zip(x, top, outcome.shares, strict=True):
            ax.annotate(
                f"{share:.2f}",
                (at, height),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    ax.set_xticks(group, [*(f'answer "{answer}"' for answer in record.answers), "invalid"], fontsize=12)
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 1.06)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.set_ylabel("probability of a completion")
    horizontal_grid(ax)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, fontsize=10, handlelength=1.6)


def _over_steps(valid: Axes, entropy: Axes, kl: Axes, record: report.Record) -> None:
    colour = VANILLA if record.algorithm.method == "vanilla" else OWN
    step, before, own = record.series("step"), record.measured_reference, record.own_optimum
    most = np.log2(len(record.answers))
    pooled = diversity.pooled_counts(record.counts_ta)
    bits = np.array([diversity.entropy_bits(counts) if counts.any() else np.nan for counts in pooled])
    levels = [(before.valid, before.entropy_bits, REFERENCE, "reference", "-")]
    if own is not None:
        levels.append((own.valid, own.entropy_bits, colour, "optimum (predicted)", "--"))
    for share, level, shade, name, line in levels:
        valid.axhline(share, color=shade, linewidth=1.2, linestyle=line, label=name)
        entropy.axhline(level, color=shade, linewidth=1.2, linestyle=line)
    _line(valid, step, record.series("valid/fraction"), colour, "valid share of each batch")
    valid.set_ylim(0, 1.06)
    valid.yaxis.set_major_formatter(PercentFormatter(1.0))
    valid.legend(frameon=False, loc="lower right", fontsize=9)
    _line(entropy, step, bits, colour, f"answer entropy (bits, {diversity.WINDOW} batches pooled)")
    entropy.set_ylim(0, 1.06 * most)
    _line(kl, step, record.series("kl/reverse"), colour, "KL to the reference (nats a completion)")
    _trend(kl, step, record.series("kl/reverse"))
    kl.set_xlabel("step")
    if not len(step):
        kl.set_xlim(0, 1)
    else:
        kl.set_xticks(step_ticks(int(step[0]), int(step[-1])))
    for ax in (valid, entropy):
        ax.tick_params(labelbottom=False)


def step_ticks(first: int, last: int) -> list[int]:
    """Round step numbers from the first to the last step, which is one of them whatever it is."""
    round_ones = MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True).tick_values(first, last)
    gap = round_ones[1] - round_ones[0]
    inside = [int(tick) for tick in round_ones if first <= tick <= last - 0.6 * gap]
    return [*inside, last]


def _line(ax: Axes, step: np.ndarray, value: np.ndarray, colour: str, title: str) -> None:
    ax.plot(step, value, color=colour, linewidth=2, marker="o" if len(step) < 4 else None, markersize=5)
    ax.set_title(title, loc="left", fontsize=11)
    horizontal_grid(ax)


def _trend(ax: Axes, step: np.ndarray, value: np.ndarray) -> None:
    """The least-squares line through the last steps, whose slope tells whether the KL has levelled off."""
    last, at = value[-report.LAST_KL :], step[-report.LAST_KL :]
    slope = diversity.slope(last)
    finite = np.isfinite(last)
    if np.isfinite(slope) and len(last) > 2:
        line = last[finite].mean() + slope * (np.arange(len(last)) - np.flatnonzero(finite).mean())
        # Ten steps of a hundred are a tenth of the width: a band shows where the line is.
        ax.axvspan(float(at[0]), float(at[-1]), color=GRID, alpha=0.7, linewidth=0)
        ax.plot(at, line, color=INK, linewidth=2.4, zorder=4, solid_capstyle="butt")
        label = f"slope over the last {len(last)} steps: {slope:+.3f} a step"
        at_corner = {"xycoords": "axes fraction", "ha": "right", "fontsize": 9, "color": QUIET}
        ax.annotate(label, (0.99, 0.05), **at_corner)
    low, high = (np.nanmin(value), np.nanmax(value)) if np.isfinite(value).any() else (0.0, 1.0)
    ax.set_ylim(min(0.0, 1.1 * low), max(1.15 * high, 0.1))
