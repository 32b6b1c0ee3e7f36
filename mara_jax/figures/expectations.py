"""What each figure must show, as checks: a measured value, the expected one, a tolerance, and whether it holds.

Checks of the exact optimum hold in every mode. Those of the trained distribution are sharp where training runs to
the optimum, and in `faithful` mode require only what the paper's optimiser settings reach with any seed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mara_jax.core import targets
from mara_jax.figures import experiments
from mara_jax.toy import problems

Check = dict[str, Any]
Panel = dict[str, Any]
Panels = Mapping[tuple[str, float], Panel]  # by objective and beta

HALF = problems.OUTCOMES // 2
REACHED = 0.02  # the total variation that counts as having reached the optimum

# Peaks of Figure 2's optimum on the left and on the right half, by beta; enumerated in float64.
PEAKS = {
    "reverse": {
        1.0: (0.0291, 0.0056),
        0.25: (0.0766, 0.0311),
        0.15: (0.0951, 0.0752),
        0.132: (0.0942, 0.0935),
        0.10: (0.0808, 0.1468),
        0.05: (0.0149, 0.3303),
        0.01: (0.0, 0.7362),
    },
    "forward": {1.0: (0.0320, 0.0088), 0.5: (0.0337, 0.1525), 0.10: (0.0070, 0.8171), 0.01: (0.0007, 0.9816)},
}
LAMBDAS = {1.0: (1.2938, 6e-5), 0.5: (1.00772, 6e-6), 0.01: (0.99921, 6e-6)}


def near(name: str, measured: float, expected: float, tolerance: float) -> Check:
    """A check that a number equals another within a tolerance.

    Args:
        name: what is measured, in words.
        measured: its value.
        expected: what it must be.
        tolerance: the largest absolute difference allowed.

    Returns:
        A dict with name, relation, measured, expected, tolerance and pass.
    """
    return _check(name, "=", measured, expected, tolerance, abs(measured - expected) <= tolerance)


def at_least(name: str, measured: float, bound: float) -> Check:
    """A check that a number is no smaller than a bound; like `near`.

    Args:
        name: what is measured, in words.
        measured: its value.
        bound: the smallest value allowed.

    Returns:
        A dict as `near` returns it.
    """
    return _check(name, ">=", measured, bound, 0.0, measured >= bound)


def at_most(name: str, measured: float, bound: float) -> Check:
    """A check that a number is no larger than a bound; like `near`.

    Args:
        name: what is measured, in words.
        measured: its value.
        bound: the largest value allowed.

    Returns:
        A dict as `near` returns it.
    """
    return _check(name, "<=", measured, bound, 0.0, measured <= bound)


def _check(name, relation, measured, expected, tolerance, passed) -> Check:
    return {
        "name": name,
        "relation": relation,
        "measured": float(measured),
        "expected": float(expected),
        "tolerance": float(tolerance),
        "pass": bool(passed),
    }


def figure_checks(name: str, problem: problems.Problem, panels: Panels, mode: str) -> list[Check]:
    """All checks of one figure over an enumerated problem.

    Args:
        name: the figure, a key of `BY_FIGURE`.
        problem: its problem.
        panels: its panels, by objective and beta.
        mode: "faithful" or "converged".

    Returns:
        The checks, in the order in which they are shown.
    """
    checks = BY_FIGURE[name](problem, panels, mode)
    if mode == "converged":
        worst = max(panel["tv_to_optimum"] for panel in panels.values())
        checks.append(at_most("largest total variation from trained to optimum", worst, REACHED))
    return checks


def peaks(p_a: np.ndarray) -> tuple[float, float]:
    """Highest probability on the left half and on the right half of the outcomes.

    Args:
        p_a: probabilities.

    Returns:
        The two peaks.
    """
    return float(np.max(p_a[:HALF])), float(np.max(p_a[HALF:]))


def flip_beta(
    problem: problems.Problem, objective: experiments.Objective, low: float = 0.02, high: float = 1.0
) -> float:
    """The beta at which the optimum's two peaks are equally high, by bisection.

    Args:
        problem: one with a bump in each half, the better one on the right.
        objective: whose optimum.
        low: a beta at which the right peak is higher.
        high: a beta at which the left one is.

    Returns:
        That beta (reward units), to 1e-6.
    """
    while high - low > 1e-6:
        middle = (low + high) / 2
        left, right = peaks(np.exp(experiments.optimum(problem, objective, middle)))
        low, high = (middle, high) if right > left else (low, middle)
    return (low + high) / 2


def _share_left(panel: Panel, good_a: np.ndarray) -> float:
    """The share of the trained mass on good outcomes that lies in the left half."""
    p_a = np.asarray(panel["trained"]) * good_a
    return float(np.sum(p_a[:HALF]) / np.sum(p_a))


def _figure2(problem: problems.Problem, panels: Panels, mode: str) -> list[Check]:
    checks = [
        near(
            "optimum, reverse KL: beta of the flip", flip_beta(problem, experiments.OBJECTIVES["reverse"]), 0.1315, 1e-4
        ),
        near(
            "optimum, forward KL: beta of the flip", flip_beta(problem, experiments.OBJECTIVES["forward"]), 0.65, 0.01
        ),
    ]
    for objective, table in PEAKS.items():
        for beta, expected in table.items():
            panel = panels[objective, beta]
            for kind, relative in {"optimum": 0.0, **({"trained": 0.03} if mode == "converged" else {})}.items():
                for side, got, want in zip(("left", "right"), peaks(np.array(panel[kind])), expected, strict=True):
                    name = f"{kind}, {objective} KL, beta {beta:g}: {side} peak"
                    # The published numbers have four decimals.
                    checks.append(near(name, got, want, 6e-5 + relative * want))
    for beta, (expected, tolerance) in LAMBDAS.items():
        p_a = np.array(panels["forward", beta]["optimum"])
        best = int(np.argmax(p_a))
        root = problem.reward[best] + beta * np.exp(problem.ref_logp[best]) / p_a[best]
        checks.append(near(f"optimum, forward KL, beta {beta:g}: Lambda", root, expected, tolerance))
    good_a = problem.reward >= problem.threshold
    # The paper saw its trained flip between .15 and .10; in these half-trained runs it comes a little earlier.
    for objective, before, after in (("reverse", 0.25, 0.10), ("forward", 1.0, 0.25)):
        for beta, bounded in ((before, at_least), (after, at_most)):
            share = _share_left(panels[objective, beta], good_a)
            checks.append(bounded(f"trained, {objective} KL, beta {beta:g}: left share of the good mass", share, 0.5))
    return checks


def _figure3(problem: problems.Problem, panels: Panels, mode: str) -> list[Check]:
    beta = 1e-3
    with jax.enable_x64(True):
        log_ratio = float(
            targets.log_ratio(problem.ref_logp[1], problem.reward[1], problem.ref_logp[0], problem.reward[0], beta)
        )
    checks = [near("how many times likelier at beta .001, closed form", np.exp(log_ratio), 2.69e43, 0.005e43)]
    better = np.array(panels["reverse", beta]["optimum"])
    checks.append(near("the same from the optimum's probabilities", better[1] / better[0], 2.69e43, 0.005e43))
    if mode == "converged":
        for beta in (1.0, 0.1):
            p_a = np.array(panels["reverse", beta]["trained"])
            checks.append(near(f"trained, beta {beta:g}: log-ratio", np.log(p_a[1] / p_a[0]), 0.1 / beta, 0.01))
    return checks


def _figure4(problem: problems.Problem, panels: Panels, mode: str) -> list[Check]:
    checks = []
    for objective in ("reverse", "forward"):
        for beta, bound in ((0.025, 0.98), (0.01, 0.99)):
            right = float(np.sum(panels[objective, beta]["optimum"][HALF:]))
            checks.append(at_least(f"optimum, {objective} KL, beta {beta:g}: mass on the best mode", right, bound))
        right = float(np.sum(panels[objective, 0.01]["trained"][HALF:]))
        bound = 0.99 if mode == "converged" else 0.80
        checks.append(at_least(f"trained, {objective} KL, beta 0.01: mass on the best mode", right, bound))
    left, right = peaks(np.array(panels["reverse", 1.0]["optimum"]))
    checks.append(near("optimum, reverse KL, beta 1: right peak over left", right / left, np.exp(0.25), 2e-3))
    closer = problems.figure4(0.9)
    for objective, bound in (("reverse", 0.99), ("forward", 0.95)):
        p_a = np.exp(experiments.optimum(closer, experiments.OBJECTIVES[objective], 0.01))
        name = f"optimum with heights .9 and 1, {objective} KL, beta 0.01: mass on the best mode"
        checks.append(at_least(name, float(np.sum(p_a[HALF:])), bound))
    return checks


def _figure5(problem: problems.Problem, panels: Panels, mode: str) -> list[Check]:
    checks, good_a = [], problem.reward >= problem.threshold
    for (objective, beta), panel in panels.items():
        left, right = peaks(np.array(panel["optimum"]))
        name = f"{objective} KL, beta {beta:g}: on-support over off-support"
        checks.append(near(f"optimum, {name}", left / right, 6.686, 6e-4))
        if mode == "converged":
            left, right = peaks(np.array(panel["trained"]))
            checks.append(near(f"trained, {name}", left / right, 6.686, 0.35))
        elif beta >= 0.05:  # at smaller betas Adam is still too close to uniform to prefer a side
            share = _share_left(panel, good_a)
            checks.append(at_least(f"trained, {objective} KL, beta {beta:g}: on-support share", share, 0.5))
    return checks


def _figure6(problem: problems.Problem, panels: Panels, mode: str) -> list[Check]:
    good_a = problem.reward >= problem.threshold
    rarest = int(np.argmin(np.where(good_a, problem.ref_logp, np.inf)))
    first = np.array(panels["reverse", 0.01]["optimum"])
    checks = [
        near("optimum, reverse KL, beta 0.01: outcome 0", first[0], 0.0616, 6e-5),
        near("optimum, reverse KL, beta 0.01: outcome 50", first[50], 0.00385, 6e-6),
    ]
    for objective, beta, expected in (
        ("mara_reverse", 1.0, 0.01939),
        ("mara_reverse", 0.01, 0.0200),
        ("mara_forward", 1.0, 0.01884),
        ("mara_forward", 0.01, 0.01996),
    ):
        level = float(np.mean(np.array(panels[objective, beta]["optimum"])[good_a]))
        checks.append(near(f"optimum, {objective}, beta {beta:g}: each good outcome", level, expected, 6e-6))
    for (objective, beta), panel in panels.items():
        checks += _figure6_panel(objective, beta, panel, good_a, rarest, mode)
    if mode == "faithful":
        distance = panels["reverse", 0.01]["tv_to_optimum"]
        checks.append(near("trained, reverse KL, beta 0.01: total variation to the optimum", distance, 0.45, 0.04))
    return checks


def _figure6_panel(objective, beta, panel, good_a, rarest, mode) -> list[Check]:
    checks, where = [], f"{objective}, beta {beta:g}"
    kinds = ("optimum", "trained") if mode == "converged" else ("optimum",)
    for kind in kinds:
        p_a, exact = np.array(panel[kind]), kind == "optimum"
        if objective in ("mara_reverse", "mara_forward"):
            spread = np.max(p_a[good_a]) / np.min(p_a[good_a]) - 1
            bound = 1e-9 if exact else 0.02
            checks.append(at_most(f"{kind}, {where}: spread over the good outcomes", spread, bound))
        elif objective == "algorithm1_forward":
            name = f"{kind}, {where}: mass of good outcome {rarest}, the reference's rarest"
            checks.append(near(name, float(p_a[rarest]), 0.81, 0.02))
        else:
            ratio, allowed = p_a[0] / p_a[50], 1e-6 if exact else 1.0
            checks.append(near(f"{kind}, {where}: outcome 0 over outcome 50", ratio, 16.0, allowed))
    if mode == "faithful" and objective in ("mara_reverse", "mara_forward"):
        name = f"trained, {where}: left share of the good mass"
        checks.append(near(name, _share_left(panel, good_a), 0.5, 0.10))
        checks.append(at_most(f"trained, {where}: total variation to the optimum", panel["tv_to_optimum"], 0.12))
    elif mode == "faithful" and beta >= 0.25:
        # Algorithm 1's reward tilts the forward KL toward the rare side, the other two keep the reference's.
        bounded, bound = (at_most, 0.40) if objective == "algorithm1_forward" else (at_least, 0.70)
        checks.append(bounded(f"trained, {where}: left share of the good mass", _share_left(panel, good_a), bound))
    return checks


def _iclr3(problem: problems.Problem, panels: Panels, mode: str) -> list[Check]:
    return _table(panels, {("reverse", 0.5): (0.069, 0.419, 0.512), ("reverse", 1e-3): (0.0, 0.0, 1.0)}, mode)


def _iclr4(problem: problems.Problem, panels: Panels, mode: str) -> list[Check]:
    checks = _table(panels, {("reverse", 0.01): (0.0, 0.9375, 0.0625)}, mode)
    for (objective, beta), panel in panels.items():
        for kind in ("optimum", "trained") if mode == "converged" else ("optimum",):
            p_a = panel[kind]
            allowed = 1e-6 if kind == "optimum" else 1.0
            name = f"{kind}, {objective} KL, beta {beta:g}: second outcome over third"
            checks.append(near(name, p_a[1] / p_a[2], 15.0, allowed))
    return checks


def _table(panels: Panels, expected: Mapping[tuple[str, float], tuple[float, ...]], mode: str) -> list[Check]:
    """Each probability against a published one; the trained ones too where training runs to the optimum."""
    return [
        near(f"{kind}, {objective} KL, beta {beta:g}: outcome {i}", got, want, 6e-4 if kind == "optimum" else 5e-3)
        for (objective, beta), row in expected.items()
        for kind in (("optimum", "trained") if mode == "converged" else ("optimum",))
        for i, (got, want) in enumerate(zip(panels[objective, beta][kind], row, strict=True))
    ]


BY_FIGURE: dict[str, Callable[[problems.Problem, Panels, str], list[Check]]] = {
    "2": _figure2,
    "3": _figure3,
    "4": _figure4,
    "5": _figure5,
    "6": _figure6,
    "iclr3": _iclr3,
    "iclr4": _iclr4,
}
