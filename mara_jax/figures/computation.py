"""One record a figure: its problem, every panel's trained distribution beside its exact optimum, and its checks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mara_jax.core import diversity
from mara_jax.figures import expectations, experiments, figure1
from mara_jax.toy import problems

FEW_BETAS = (1.0, 0.1, 0.01, 0.001)


class Figure(NamedTuple):
    """What a figure shows: title and claim, problem, objectives, betas, and which of them are plotted."""

    title: str
    claim: str
    problem: Callable[[], problems.Problem]
    objectives: tuple[str, ...] = ("reverse", "forward")
    betas: tuple[float, ...] = experiments.BETAS
    plotted_betas: tuple[float, ...] = experiments.BETAS


FIGURES = {
    "2": Figure(
        "Beta decides which mode wins, under both KLs",
        "Reference on the left, higher reward on the right: one beta makes them equal (.1315 reverse, .653 forward).",
        problems.figure2,
    ),
    "3": Figure(
        "A little more reward, vastly more probability",
        "Equal under the reference, rewards .9 and 1: the better outcome is exp(.1 / beta) times likelier.",
        problems.figure3,
        ("reverse",),
        FEW_BETAS,
        FEW_BETAS,
    ),
    "4": Figure(
        "Small beta leaves only the best mode",
        "Uniform reference, rewards .75 and 1.",
        problems.figure4,
    ),
    "5": Figure(
        "Equal rewards keep the reference's ratio, at every beta",
        "Both modes earn 1; the optimum makes the right one 6.7 times rarer, as the reference does.",
        problems.figure5,
    ),
    "6": Figure(
        "MARA makes every good outcome equally likely",
        "Fifty good outcomes of reward 1, in two blocks; the reference falls from left to right.",
        problems.figure6,
        tuple(experiments.OBJECTIVES),
        experiments.BETAS,
        (1.0, 0.25, 0.1, 0.05, 0.01),
    ),
    "iclr3": Figure(
        "Small beta tells .9 from 1",
        "Three outcomes, equal under the reference; the optimum of the reverse KL.",
        problems.iclr3,
        ("reverse",),
        (0.5, 0.1, 0.01, 0.001),
        (0.5, 0.1, 0.01, 0.001),
    ),
    "iclr4": Figure(
        "Two right answers keep the reference's 15 to 1",
        "At every beta, under both KLs.",
        problems.iclr4,
        ("reverse", "forward"),
        (1.0, 0.5, 0.1, 0.01),
        (1.0, 0.5, 0.1, 0.01),
    ),
}
NAMES = ("1", *FIGURES)


def record(name: str, mode: str) -> dict[str, Any]:
    """Trains all panels of a figure and compares them with their optima.

    Args:
        name: one of `NAMES`.
        mode: "faithful" (the papers' optimiser settings) or "converged" (run to the optimum).

    Returns:
        What the figure's JSON holds: plain numbers, strings, lists and dicts.

    Raises:
        ValueError: for an unknown figure or mode.
    """
    if name not in NAMES:
        raise ValueError(f"figure {name!r} is not known: use some of {', '.join(NAMES)}")
    if mode not in experiments.MODES:
        raise ValueError(f"mode {mode!r} is not known: use {' or '.join(experiments.MODES)}")
    return _families_record(mode) if name == "1" else _problem_record(name, mode)


def _problem_record(name: str, mode: str) -> dict[str, Any]:
    figure, settings = FIGURES[name], experiments.MODES[mode]
    problem = figure.problem()
    good_a = problem.reward >= problem.threshold
    panels = {}
    for key in figure.objectives:
        objective = experiments.OBJECTIVES[key]
        trained_ba = experiments.train(problem, objective, figure.betas, settings)
        for beta, trained_a in zip(figure.betas, trained_ba, strict=True):
            optimum_a = experiments.optimum(problem, objective, beta)
            named = {"objective": key, "label": objective.label, "method": objective.method}
            panels[key, beta] = (
                named | {"direction": objective.direction, "beta": beta} | distances(trained_a, optimum_a, good_a)
            )
    settings_used = dataclasses.asdict(settings) | {"optimiser": "adam", "start": "all logits 0"}
    if settings.gradients == "sampled":
        settings_used |= {
            "baseline": "none",
            "anchor": "in the batch",
            "forward_kl": "samples of the reference, a batch a step",
        }
    return {
        "figure": name,
        "title": figure.title,
        "claim": figure.claim,
        "mode": mode,
        "settings": settings_used,
        "problem": {
            "reference": np.exp(problem.ref_logp).tolist(),
            "reward": problem.reward.tolist(),
            "threshold": problem.threshold,
        },
        "drawn_betas": list(figure.plotted_betas),
        "panels": list(panels.values()),
        "checks": expectations.figure_checks(name, problem, panels, mode),
    }


def distances(trained_a: np.ndarray, optimum_a: np.ndarray, good_a: np.ndarray | None) -> dict[str, Any]:
    """Both distributions, and the distances between them.

    Args:
        trained_a: log-probabilities (nats).
        optimum_a: log-probabilities (nats).
        good_a: which outcomes are good; None where nothing is rewarded.

    Returns:
        Probabilities, total variations (0 to 1) and KLs both ways (nats), ready for JSON.
    """
    uniform_a = None if good_a is None else good_a / np.sum(good_a)
    p_a, q_a = np.exp(trained_a), np.exp(optimum_a)
    return {
        "trained": p_a.tolist(),
        "optimum": q_a.tolist(),
        "tv_to_optimum": diversity.total_variation(p_a, q_a),
        "kl_trained_to_optimum": float(np.sum(p_a * (trained_a - optimum_a))),
        "kl_optimum_to_trained": float(np.sum(q_a * (optimum_a - trained_a))),
        "tv_to_uniform_good": None if uniform_a is None else diversity.total_variation(p_a, uniform_a),
        "optimum_tv_to_uniform_good": None if uniform_a is None else diversity.total_variation(q_a, uniform_a),
    }


def _families_record(mode: str) -> dict[str, Any]:
    settings, mixture = experiments.MODES[mode], figure1.Mixture()
    x_a, target_a = mixture.x_a, mixture.logp_a
    panels = {}
    for family in figure1.FAMILIES:
        for direction in ("reverse", "forward"):
            _, fitted_a = figure1.fit(
                target_a, x_a, family, direction, learning_rate=settings.learning_rate, steps=settings.steps
            )
            best_a = target_a
            if family == "gaussian":
                best_a = figure1.gaussian_logp(figure1.best_gaussian(target_a, x_a, direction), x_a)
            mean, deviation = figure1.moments(fitted_a, x_a)
            panels[family, direction] = {
                "family": family,
                "method": "fit",
                "direction": direction,
                "beta": None,
                "mean": mean,
                "deviation": deviation,
                "tv_to_target": diversity.total_variation(np.exp(fitted_a), np.exp(target_a)),
            } | distances(fitted_a, best_a, None)
    return {
        "figure": "1",
        "title": "Restricted families seek or cover, flexible ones match",
        "claim": "A Gaussian and a free categorical, fitted to a mixture of two Gaussians under both KLs.",
        "mode": mode,
        "settings": {
            "gradients": "exact",
            "learning_rate": settings.learning_rate,
            "steps": settings.steps,
            "optimiser": "adam",
            "start": "standard normal, and all logits 0",
        },
        "problem": {"x": x_a.tolist(), "target": np.exp(target_a).tolist(), "mixture": mixture._asdict()},
        "panels": list(panels.values()),
        "checks": _families_checks(panels, mixture, mode),
    }


def _families_checks(panels, mixture: figure1.Mixture, mode: str) -> list[expectations.Check]:
    near, at_least, at_most = expectations.near, expectations.at_least, expectations.at_most
    mean, deviation = mixture.moments
    seeks, covers = panels["gaussian", "reverse"], panels["gaussian", "forward"]
    heavier, left = int(np.argmax(mixture.weight)), mixture.x_a < 0
    sharp = mode == "converged"
    checks = [
        near("Gaussian, reverse KL: mean, that of the heavier mode", seeks["mean"], mixture.mean[heavier], 1e-3),
        near("Gaussian, reverse KL: deviation, that of the mode", seeks["deviation"], mixture.deviation[heavier], 0.05),
        at_most("Gaussian, reverse KL: mass on the other mode", float(np.array(seeks["trained"])[~left].sum()), 1e-4),
        near("Gaussian, forward KL: mean, that of the mixture", covers["mean"], mean, 1e-6 if sharp else 0.02),
        near(
            "Gaussian, forward KL: deviation, that of the mixture",
            covers["deviation"], deviation, 1e-6 if sharp else 0.05,
        ),
    ]  # fmt: skip
    for side, there in (("left", left), ("right", ~left)):
        mass = float(np.array(covers["trained"])[there].sum())
        checks.append(at_least(f"Gaussian, forward KL: mass on the {side} side", mass, 0.3))
    reached = expectations.REACHED if sharp else 0.12
    for (family, direction), panel in panels.items():
        what = "target" if family == "categorical" else "best Gaussian"
        name = f"{family}, {direction} KL: total variation from trained to {what}"
        checks.append(at_most(name, panel["tv_to_optimum"], reached))
    return checks
