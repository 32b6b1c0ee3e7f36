"""An audit as one record of numbers and words: which gradient a setting has, where it ends, what that means."""

import dataclasses
from typing import Any

import jax
import numpy as np

from mara_jax import config
from mara_jax.audit import fixed_point, gradients, off_policy, problems, verdict
from mara_jax.audit.published import Setting
from mara_jax.core import diversity, kl, methods

_MARA = tuple(name for name, row in methods.TRANSFORMS.items() if row.anchor)


def audit(
    setting: Setting,
    *,
    one_token: bool = False,
    group: int = gradients.GROUP,
    refused: str = "",
) -> dict[str, Any]:
    """Audits a setting: numbers and words that can be written as JSON.

    Args:
        setting: what is audited.
        one_token: on five outcomes of one token instead of fifteen strings.
        group: strings a group, 1 to 4.
        refused: why training refuses the setting, if it does.

    Returns:
        The record: see docs/audit.md.

    Raises:
        ValueError: a group too small for the baseline, or a beta of 0 that a formula divides by.
    """
    with jax.enable_x64(True):
        problem = problems.five() if one_token else problems.strings()
        compared = gradients.gradients(setting, problem, group)
        whole = problems.anchors(problem, setting.algorithm)
        end = gradients.fixed_point_of(setting, problem, group, whole)
        record = {
            "name": setting.name,
            "verdict": "",
            "form": setting.form,
            "rule": _rule(setting.algorithm),
            "refused": refused or None,
            "algorithm": dataclasses.asdict(setting.algorithm),
            "enumerated": {
                "strings": len(problem.reward),
                "good": int(np.sum(problem.reward >= setting.algorithm.threshold)),
                "policies": len(problem.params),
                "group": group,
            },
            "problem": _listed(problem),
            **_identified(setting, compared),
            "gradients": {
                part: {
                    name: gradients.compare(compared["expected"][part], exact) for name, exact in compared[part].items()
                }
                for part in ("kl", "objective")
            },
            "stationary": _ended(end, problems.closed_forms(problem, setting.algorithm, group)),
            "stale": off_policy.rows(setting, problem, group),
            "anchor_in_group": _anchor_bias(setting, problem, group, end),
            "five_outcomes": _five(setting, group, end if one_token else None),
        }
    record["optimum"] = verdict.optimum(record)
    record["verdict"] = verdict.sentence(record)
    return record


def _listed(problem: problems.Problem) -> dict[str, list[Any]]:
    """What a closed form needs, string by string, in the order of the probabilities; answer None for no answer."""
    lengths = problem.strings.mask.sum(axis=1)
    return {
        "tokens": [row[:length].tolist() for row, length in zip(problem.strings.tokens, lengths, strict=True)],
        "reference": np.exp(problem.ref_logp).tolist(),
        "reward": problem.reward.tolist(),
        "answer": [None if answer < 0 else int(answer) for answer in problem.answer],
    }


def _rule(algorithm: config.Algorithm) -> dict[str, str] | None:
    """The row of `core.kl.effective` that the estimator, its place and its level stand in, and the other level's."""
    pair = kl.PLACED.get(algorithm.estimator)
    if pair is None:
        return None
    other = "token" if algorithm.level == "sequence" else "sequence"
    return {
        "level": algorithm.level,
        "sentence": kl.effective(*pair, algorithm.level).sentence,
        "other_level": other,
        "other_sentence": kl.effective(*pair, other).sentence,
    }


def _comparisons(compared: dict[str, dict[str, np.ndarray]], part: str) -> dict[str, dict[str, Any]]:
    expected = compared["expected"][part]
    return {name: gradients.compare(expected, exact) for name, exact in compared[part].items()}


def _identified(setting: Setting, compared: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Which KL, how strong, whether the reward's gradient is that of E[R], and whether the whole is one objective."""
    expected = compared["expected"]
    factors = {name: gradients.factor_of(expected["objective"], exact) for name, exact in compared["objective"].items()}
    matched = [name for name in gradients.KLS if factors[name] is not None]
    return {
        "kl": gradients.identify(expected["kl"], compared["unit"], setting.algorithm.beta),
        "reward_factor": gradients.factor_of(expected["objective"] - expected["kl"], compared["reward"]["reward"]),
        "objective": {"name": matched[0], "factor": factors[matched[0]]} if matched else None,
    }


def _ended(end: fixed_point.Point, forms: dict[str, np.ndarray]) -> dict[str, Any]:
    distances = {name: diversity.total_variation(end.probability, form) for name, form in forms.items()}
    return {
        "kind": end.kind,
        "gradient": end.residual,
        "nearest": min(distances, key=lambda name: distances[name]),
        "total_variation": distances,
        "probability": end.probability.tolist(),
    }


def _anchor_bias(
    setting: Setting, problem: problems.Problem, group: int, end: fixed_point.Point
) -> list[dict[str, Any]]:
    """What it costs to take MARA's anchor from groups of each size instead of from all good strings."""
    whole = problems.anchors(problem, setting.algorithm)
    if whole == problems.FROM_GROUP:
        return []
    sizes = gradients.SIZES if problem.strings.tokens.shape[1] > 1 else gradients.SIZES_OF_OUTCOMES
    if setting.algorithm.estimator == "reference_samples":
        sizes = sizes[:1]  # the reference's groups stand beside the policy's: larger ones are too many together
    elif setting.algorithm.baseline == "group_normalised":
        sizes = (group,)  # the end without the bias depends on the group as well
    rows = []
    for size in sizes:
        end_of_group = gradients.fixed_point_of(setting, problem, size, problems.FROM_GROUP)
        of_whole, of_group = (
            gradients.at_policies(setting, problem, size, anchor) for anchor in (whole, problems.FROM_GROUP)
        )
        distance = diversity.total_variation(end_of_group.probability, end.probability)
        error = gradients.compare(of_group, of_whole)["relative_error"]
        rows.append({"group": size, "gradient_error": error, "total_variation": distance})
    return rows


def _five(setting: Setting, group: int, end: fixed_point.Point | None) -> dict[str, Any]:
    """Where the setting ends on five outcomes, without and with MARA over strings; `end` is known for its own.

    A setting whose rewards pass another transform is there once, with that: it has no place for MARA's.
    """
    problem = problems.five()
    other = setting.algorithm.transform not in ("none", *_MARA)
    transforms = {"vanilla": setting.algorithm.transform} if other else {"vanilla": "none", "mara": "mara_strings"}
    ends = {}
    for method, transform in transforms.items():
        algorithm = dataclasses.replace(setting.algorithm, transform=transform, anchor="string")
        variant = setting._replace(algorithm=algorithm)
        known = end if variant == setting else None
        ends[method] = known or gradients.fixed_point_of(variant, problem, group, problems.anchors(problem, algorithm))
    return {
        "reference": np.exp(problem.ref_logp).tolist(),
        "reward": problem.reward.tolist(),
        **{method: end.probability.tolist() for method, end in ends.items()},
        **{f"{method}_kind": end.kind for method, end in ends.items()},
    }
