"""What an objective's gradient is on strings that the present policy did not draw, by enumeration, in float64.

Two things may stand between: a rollout's earlier updates (the strings come from an older policy), and a sampler whose
log-probabilities are not the trainer's. Either is tried at several distances, at every policy of a problem.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.audit import enumeration, gradients, problems
from mara_jax.audit.published import Setting

SCALES = (0.05, 0.2, 0.5)  # of the random change of every logit (nats)


def rows(setting: Setting, problem: problems.Problem, group: int) -> list[dict[str, Any]]:
    """Expected gradient of the whole objective against the exact one of the present policy, by distance.

    Args:
        setting: what is audited; its ratios are compared where it has any, its truncated weights likewise.
        problem: where; MARA's anchor is that of the whole set.
        group: strings a group.

    Returns:
        For each of "updates" and "sampler" that the setting weights, and each distance: `between`, `nats` (KL of
        the policy that drew the strings to the present one, mean over policies), `effective_share` (of the strings, by
        the ratios of whole ones), and what `audit.compare` finds.
    """
    algorithm = setting.algorithm
    kinds = [("updates", algorithm.importance != "none"), ("sampler", algorithm.truncate > 0)]
    cases = [(kind, scale) for kind, used in kinds if used for scale in SCALES]
    if not cases:
        return []
    over = gradients.case(setting, problem, group, problems.anchors(problem, algorithm))
    over = over._replace(ref_groups=enumeration.groups(len(problem.reward), 1))
    policies = (_policies(problem, *kind_and_scale) for kind_and_scale in cases)
    now_rkcv, old_rkcv, sampler_rkcv = (np.stack(params) for params in zip(*policies, strict=True))
    drawn = gradients.Drawn(old_rkcv, sampler_rkcv)
    expected, exact, nats, share = _compared(setting, over, now_rkcv, drawn, *problems.augmented(problem, algorithm))
    objective = exact["reward"] - algorithm.beta * exact[f"{algorithm.kl}_sequence"]
    expected, objective = (np.asarray(x).reshape(*now_rkcv.shape[:2], -1) for x in (expected, objective))
    means = nats.mean(axis=1).tolist(), share.mean(axis=1).tolist()
    return [
        {"between": kind, "nats": distance, "effective_share": effective, **gradients.compare(estimate, true)}
        for (kind, _), estimate, true, distance, effective in zip(cases, expected, objective, *means, strict=True)
    ]


def _policies(problem: problems.Problem, kind: str, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The present policies, those before a rollout's first update, and the samplers, [k, c, v] each."""
    away = scale * np.random.default_rng(5).normal(size=problem.params.shape)
    if kind == "updates":
        return problem.params + away, problem.params, problem.params
    return problem.params, problem.params, problem.params + away


@functools.partial(jax.jit, static_argnames="setting")
def _compared(setting: Setting, over: gradients.Case, now, drawn: gradients.Drawn, reward, ref_logp):
    """Expected and exact gradients, distance and share of effective strings of every policy [r, k, ...]."""

    def compare(now, drawn):
        exact = gradients.exact_gradients(over.problem, now, reward, ref_logp)
        logp, from_logp = (enumeration.string_logp(p, over.problem.strings) for p in (now, drawn.sampler))
        nats = jnp.sum(jnp.exp(from_logp) * (from_logp - logp))
        share = 1 / jnp.sum(jnp.exp(2 * logp - from_logp))
        return gradients.expected_gradient(setting, over, now, drawn), exact, nats, share

    return jax.vmap(jax.vmap(compare))(now, drawn)
