"""Figures 7 and 8 of a population, from `population_curves`."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mara_jax.evaluate.population_curves import Curves, checkpoints, front
from mara_jax.plot_style import QUIET, horizontal_grid, save, style
from mara_jax.train.population.report import COLOURS


def colours(members: Sequence[Curves]) -> dict[str, str]:
    """A colour for each kind of member."""
    kinds = list(dict.fromkeys(one.kind for one in members))
    return dict(zip(kinds, COLOURS * len(kinds), strict=False))


def figure7(path: pathlib.Path, members: Sequence[Curves]) -> pathlib.Path:
    """Every member over training: share of the first answer, entropy of the answers, reward against entropy."""
    colour_of, betas = colours(members), sorted({one.beta for one in members})
    with style():
        figure = Figure(figsize=(13.0, 0.8 + 2.6 * len(colour_of)), dpi=130)
        axes = figure.subplots(len(colour_of), 3, squeeze=False, sharex="col")
        for row, (kind, colour) in zip(axes, colour_of.items(), strict=True):
            own = [one for one in members if one.kind == kind]
            share, bits, both = row
            for one in own:
                steps, tint = np.arange(1, len(one.bits) + 1), tinted(colour, one.beta, betas)
                share.plot(steps, one.share, color=tint, linewidth=0.9)
                bits.plot(steps, one.bits, color=tint, linewidth=0.9)
                both.plot(one.bits, one.reward, color=tint, alpha=0.4, linewidth=0.8)
                both.scatter(one.bits[-1:], one.reward[-1:], s=14, color=tint, linewidths=0, zorder=3)
            shades = f", dark: beta {betas[-1]:g}, pale: {betas[0]:g}" if len(betas) > 1 else ""
            share.set_title(f"{kind}: {len(own)} runs{shades}", loc="left", fontsize=11)
            _limits(share, 1.0, "share of the first answer")
            _limits(bits, own[0].most, "entropy (bits)")
            both.set_ylabel("reward")
            horizontal_grid(both)
        for ax, label in zip(axes[-1], ("step", "step", "entropy (bits)"), strict=True):
            ax.set_xlabel(label)
        figure.tight_layout()
        return save(figure, path)


def tinted(colour: str, beta: float, betas: Sequence[float]) -> tuple[float, ...]:
    """The colour itself for the largest beta, paler for smaller ones; betas: all there are, rising."""
    pale = 0.72 * (1 - betas.index(beta) / (len(betas) - 1)) if len(betas) > 1 else 0.0
    return tuple(pale + (1 - pale) * part for part in to_rgb(colour))


def _limits(ax: Axes, most: float, label: str) -> None:
    ax.set_ylim(-0.03 * most, 1.03 * most)
    ax.set_ylabel(label)
    horizontal_grid(ax)


def figure8(path: pathlib.Path, members: Sequence[Curves]) -> pathlib.Path:
    """Reward against entropy of all checkpoints, averaged over seeds, with each kind's front; then the entropy that
    was forecast before training beside the one that was reached, and the distance to each member's own optimum."""
    colour_of, points, betas = colours(members), checkpoints(members), sorted({one.beta for one in members})
    with style():
        figure = Figure(figsize=(14.0, 4.6), dpi=130)
        pareto, forecast, distance = figure.subplots(1, 3)
        for kind, colour in colour_of.items():
            own = [point for point in points if point.kind == kind]
            place = {"x": [p.bits for p in own], "y": [p.reward for p in own]}
            errors = {"xerr": [1.96 * p.bits_error for p in own], "yerr": [1.96 * p.reward_error for p in own]}
            pareto.errorbar(**place, **errors, fmt="o", markersize=2.5, color=colour, alpha=0.3, elinewidth=0.6)
            best = front(own)
            pareto.plot([p.bits for p in best], [p.reward for p in best], color=colour, linewidth=1.8, label=kind)
            known = [one for one in members if one.kind == kind and one.forecast is not None]
            tints = [tinted(colour, one.beta, betas) for one in known]
            x, y = [one.forecast for one in known], [one.bits[-1] for one in known]
            forecast.scatter(x, y, s=20, color=tints, linewidths=0, label=kind)
        _distances(distance, members, colour_of)
        pareto.set_title("checkpoints, mean over seeds", loc="left", fontsize=11)
        pareto.set_xlabel("entropy (bits)")
        pareto.set_ylabel("reward")
        most = members[0].most
        forecast.plot([0, most], [0, most], color=QUIET, linewidth=0.8, zorder=0)
        forecast.set_title("each run's end beside its forecast", loc="left", fontsize=11)
        forecast.set_xlabel("forecast before training (bits)")
        forecast.set_ylabel("reached (bits)")
        for ax in (pareto, forecast, distance):
            horizontal_grid(ax)
        pareto.legend(frameon=False, fontsize=9, labelcolor=QUIET)
        figure.tight_layout()
        return save(figure, path)


def _distances(ax: Axes, members: Sequence[Curves], colour_of: dict[str, str]) -> None:
    """Total variation to the own optimum, a dot a member, by beta."""
    betas = sorted({one.beta for one in members})
    for place, (kind, colour) in enumerate(colour_of.items()):
        known = [(one.beta, one.distance) for one in members if one.kind == kind and one.distance is not None]
        shift = (place - (len(colour_of) - 1) / 2) * 0.7 / len(colour_of)
        x = [betas.index(beta) + shift for beta, _ in known]
        ax.scatter(x, [gap for _, gap in known], s=18, color=colour, alpha=0.6, linewidths=0)
    ax.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    ax.set_title("distance to the run's own optimum", loc="left", fontsize=11)
    ax.set_xlabel("beta")
    ax.set_ylabel("total variation of the answers' shares")
    ax.set_ylim(bottom=0)
