"""Expected gradients of a setting's objective, by enumeration in float64, against those of E[R] - beta KL.

The expectation runs over every group of strings of a small problem, through the objective that the setting names (for
a configuration: `core.method_rules.loss`, as the update calls it).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.audit import enumeration, fixed_point, problems
from mara_jax.audit.published import Setting
from mara_jax.core import kl
from mara_jax.core.scored import Numbers, Scored

GROUP = 2  # strings a group in the comparison of gradients: the fewest with which every baseline is defined
# Group sizes at which an anchor taken from the group is compared with the whole set's.
SIZES, SIZES_OF_OUTCOMES = (2, 4), (2, 4, 8)
EXACT, ZERO = 1e-8, 1e-10  # relative errors below which two gradients are the same, and a gradient is none
KLS = ("reverse_sequence", "forward_sequence", "reverse_token", "forward_token")


class Case(NamedTuple):
    """All that an expectation runs over, as arrays that a compiled function takes.

    `groups` and `ref_groups` list groups of the policy's and of the reference's strings; `log_mass` [1, a] and
    `anchor` are what MARA takes from outside a group.
    """

    problem: problems.Problem
    groups: enumeration.Groups
    ref_groups: enumeration.Groups
    log_mass: np.ndarray
    anchor: problems.Anchors


def case(setting: Setting, problem: problems.Problem, size: int, anchor: problems.Anchors) -> Case:
    """Every group of one size.

    Args:
        setting: its algorithm gives the classes' masses.
        problem: the strings.
        size: strings a group.
        anchor: MARA's anchor; where it is left to the groups, those of the reference are as large.

    Returns:
        The case.
    """
    groups = enumeration.groups(len(problem.reward), size)
    ref_groups = groups if anchor == problems.FROM_GROUP else enumeration.groups(len(problem.reward), 1)
    return Case(problem, groups, ref_groups, problems.log_mass(problem, setting.algorithm), anchor)


class Drawn(NamedTuple):
    """Policies behind a rollout where they are not the one that is trained, logits [c, v] each: the one before the
    rollout's first update, and the sampler, whose log-probabilities may differ from that policy's."""

    old: Any
    sampler: Any


def expected_gradient(setting: Setting, over: Case, params, drawn: Drawn | None = None) -> jax.Array:
    """Minus the gradient of the loss, averaged over all groups by their probability.

    Args:
        setting: the objective and its algorithm, whose beta and threshold are used.
        over: problem and groups; those of the reference are read by "reference_samples" alone.
        params: logits of the policy, [c, v].
        drawn: which policies the strings come from; by default from this one.

    Returns:
        An array like `params`: the direction in which training moves the policy.
    """
    drawn = drawn or Drawn(params, params)
    algorithm, problem, strings = setting.algorithm, over.problem, over.problem.strings
    numbers = Numbers(algorithm.beta, algorithm.threshold, algorithm.eta)
    mask_nt, reward_n, answer_n, ref_n = map(
        jnp.asarray, (strings.mask, problem.reward, problem.answer, problem.ref_logp)
    )
    old_nt, sampler_nt = (enumeration.token_logp(jax.lax.stop_gradient(p), strings) for p in drawn)
    ref_nt, log_mass = enumeration.token_logp(problem.ref_params, strings), jnp.asarray(over.log_mass)
    # On the policy's own strings the expected gradient of trajectory balance is the same for every constant.
    log_z = jax.nn.logsumexp(ref_n + reward_n / max(algorithm.beta, problems.TINY_BETA), keepdims=True)

    def scored(logp_nt, index_g) -> Scored:
        logp, mask, ref_token_logp = (x[index_g][None] for x in (logp_nt, mask_nt, ref_nt))
        ref_logp, reward, answer = (x[index_g][None] for x in (ref_n, reward_n, answer_n))
        anchor = over.anchor.reward, over.anchor.ref_logp
        older = (x[index_g][None] for x in (old_nt, sampler_nt))
        group = Scored(logp, mask, ref_logp, reward, answer, log_mass, ref_token_logp, *anchor, *older)
        return group._replace(prompt_log_z=log_z)

    def loss(logp_nt, index_g):
        def beside(reference: Scored | None):
            group = scored(logp_nt, index_g)
            return setting.objective(algorithm, group, reference, numbers)[0]

        if algorithm.estimator != "reference_samples":
            return beside(None)
        probability_m = enumeration.group_probability(problem.ref_params, strings, over.ref_groups)
        ref_index_mg = jnp.asarray(over.ref_groups.index)
        return probability_m @ jax.vmap(lambda ref_index_g: beside(scored(logp_nt, ref_index_g)))(ref_index_mg)

    return -enumeration.expected_gradient(loss, params, strings, over.groups, drawn.sampler)


def exact_gradients(problem: problems.Problem, params, reward, ref_logp) -> dict[str, jax.Array]:
    """Gradients in the logits of what an objective may consist of.

    At token level a KL is that between the two next-token distributions, averaged over the positions that the
    policy visits; how it visits them is not differentiated.

    Args:
        problem: strings and the reference's next-token distributions.
        params: logits of the policy [c, v].
        reward: of each string, augmented or not [n].
        ref_logp: the reference of whole strings, augmented or not (nats, [n]).

    Returns:
        "reward" for E[R], and one for each of KLS, all like `params`.
    """
    visits_c = enumeration.expected_visits(params, problem.strings)
    ref_cv = jax.nn.log_softmax(jnp.asarray(problem.ref_params))

    def gradient(f: Callable) -> jax.Array:
        return jax.grad(lambda p: f(enumeration.string_logp(p, problem.strings), jax.nn.log_softmax(p)))(params)

    return {
        "reward": gradient(lambda logp, _: jnp.sum(jnp.exp(logp) * reward)),
        "reverse_sequence": gradient(lambda logp, _: kl.reverse(logp, ref_logp)),
        "forward_sequence": gradient(lambda logp, _: kl.forward(logp, ref_logp)),
        "reverse_token": gradient(lambda _, logp_cv: visits_c @ kl.reverse(logp_cv, ref_cv)),
        "forward_token": gradient(lambda _, logp_cv: visits_c @ kl.forward(logp_cv, ref_cv)),
    }


def gradients(setting: Setting, problem: problems.Problem, group: int = GROUP) -> dict[str, dict[str, np.ndarray]]:
    """Expected and exact gradients at every policy of the problem, [k, c * v] each.

    Args:
        setting: what is audited.
        problem: where.
        group: strings a group.

    Returns:
        "expected": "kl" (every reward 0, no transform) and "objective" (MARA's anchor over the whole set);
        "kl": the gradients of -beta KL for each of KLS, "unit" those of -KL; "objective": those of
        E[R] - beta KL with rewards and reference augmented; "reward": that of E[R].
    """
    beta, n = setting.algorithm.beta, len(problem.reward)
    bare = setting._replace(algorithm=dataclasses.replace(setting.algorithm, transform="none"))
    alone = case(bare, problem._replace(reward=np.zeros(n)), group, problems.FROM_GROUP)
    alone = alone._replace(ref_groups=enumeration.groups(n, 1))
    whole = case(setting, problem, group, problems.anchors(problem, setting.algorithm))
    whole = whole._replace(ref_groups=alone.ref_groups)
    expected = {"kl": _at_policies(bare, alone), "objective": _at_policies(setting, whole)}
    plain = _exact_at_policies(problem, problem.params, problem.reward, problem.ref_logp)
    lifted = _exact_at_policies(problem, problem.params, *problems.augmented(problem, setting.algorithm))
    tree = {
        "expected": expected,
        "kl": {name: -beta * plain[name] for name in KLS},
        "objective": {name: lifted["reward"] - beta * lifted[name] for name in KLS},
        "reward": {"reward": lifted["reward"]},
        "unit": {name: -plain[name] for name in KLS},
    }
    return jax.tree.map(lambda x: np.asarray(x).reshape(len(problem.params), -1), tree)


_exact_at_policies = jax.jit(jax.vmap(exact_gradients, (None, 0, None, None)))


@functools.partial(jax.jit, static_argnames="setting")
def _at_policies(setting: Setting, over: Case) -> jax.Array:
    return jax.vmap(functools.partial(expected_gradient, setting, over))(over.problem.params)


def at_policies(setting: Setting, problem: problems.Problem, size: int, anchor: problems.Anchors) -> np.ndarray:
    """The expected gradient of the whole objective at every policy of the problem, [k, c * v].

    Args:
        setting: what is audited.
        problem: where.
        size: strings a group.
        anchor: MARA's anchor.
    """
    return np.asarray(_at_policies(setting, case(setting, problem, size, anchor))).reshape(len(problem.params), -1)


def compare(got: np.ndarray, want: np.ndarray) -> dict[str, Any]:
    """Cosine and relative error of one gradient against another, over the policies.

    Args:
        got: [k, d].
        want: [k, d].

    Returns:
        The worst of each, "cosine" and "relative_error", and the smallest error; None for a cosine with zero.
    """
    sizes = np.linalg.norm(got, axis=1), np.linalg.norm(want, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.sum(got * want, axis=1) / (sizes[0] * sizes[1])
        error = np.linalg.norm(got - want, axis=1) / sizes[1]
    defined = bool(np.all(sizes[0] > ZERO * sizes[1]) and np.all(sizes[1] > 0))
    return {
        "cosine": float(cosine.min()) if defined else None,
        "relative_error": float(error.max()) if np.all(sizes[1] > 0) else None,
        "smallest_error": float(error.min()) if np.all(sizes[1] > 0) else None,
    }


def identify(got: np.ndarray, unit: dict[str, np.ndarray], beta: float) -> dict[str, Any]:
    """Which KL a gradient is that of, up to a factor that is the same at every policy.

    Args:
        got: expected gradient of the KL's part alone [k, d].
        unit: gradients of -KL for each of KLS.
        beta: the configured strength.

    Returns:
        "name" ("none", "reverse", "forward", "reverse_minus_forward" or "neither"), "level" ("sequence", "token",
        "mixed" or None), "beta": the strength it really has.
    """
    size = np.linalg.norm(unit["reverse_sequence"], axis=1)
    if np.all(np.linalg.norm(got, axis=1) <= ZERO * size):
        return {"name": "none", "level": None, "beta": 0.0}
    known = {tuple(name.split("_")): unit[name] for name in KLS}
    known |= {
        ("reverse_minus_forward", "sequence"): unit["reverse_sequence"] - unit["forward_sequence"],
        ("reverse_minus_forward", "token"): unit["reverse_token"] - unit["forward_token"],
        ("reverse_minus_forward", "mixed"): unit["reverse_sequence"] - unit["forward_token"],
    }
    for (name, level), want in known.items():
        factor = factor_of(got, want)
        if factor is not None:
            # Rounding apart, the configured strength is the strength.
            return {"name": name, "level": level, "beta": beta if abs(factor - beta) <= EXACT * beta else factor}
    return {"name": "neither", "level": None, "beta": None}


def factor_of(got: np.ndarray, want: np.ndarray) -> float | None:
    """The number by which `got` is `want` at every policy, or None.

    Args:
        got: [k, d].
        want: [k, d].
    """
    factor = float(np.sum(got * want) / max(np.sum(want * want), np.finfo(float).tiny))
    off = np.linalg.norm(got - factor * want, axis=1) > EXACT * np.linalg.norm(got, axis=1)
    return None if off.any() or factor == 0 else factor


def fixed_point_of(
    setting: Setting, problem: problems.Problem, size: int, anchor: problems.Anchors
) -> fixed_point.Point:
    """Where training from the reference ends.

    Args:
        setting: what is audited.
        problem: where.
        size: strings a group.
        anchor: MARA's anchor.

    Returns:
        The end.
    """
    flow = fixed_point.flow(lambda params, over: expected_gradient(setting, over, params), problem.strings)
    return fixed_point.find(flow, problem.ref_params, case(setting, problem, size, anchor))
