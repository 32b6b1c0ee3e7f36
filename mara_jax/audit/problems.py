"""Two problems small enough to enumerate: their strings, what MARA makes of them, and every closed form on them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import config
from mara_jax.audit import enumeration
from mara_jax.core import augment, method_rules, targets
from mara_jax.core.method_rows import Outcomes
from mara_jax.core.scored import Numbers

TINY_BETA = 1e-6  # stands for 0 in closed forms, whose limit it is


class Problem(NamedTuple):
    """Strings with a reference and scores, and policies at which gradients are compared.

    `ref_params` [c, v] and `params` [k, c, v] logits; `ref_logp`, `reward` and `answer` [n], class -1 for no
    answer.
    """

    strings: enumeration.Strings
    ref_params: np.ndarray
    params: np.ndarray
    ref_logp: np.ndarray
    reward: np.ndarray
    answer: np.ndarray


def _problem(all_strings: enumeration.Strings, ref_params: np.ndarray, away: np.ndarray, reward, answer) -> Problem:
    with jax.enable_x64(True):
        ref_logp = np.asarray(enumeration.string_logp(ref_params, all_strings))
    return Problem(all_strings, ref_params, ref_params + away, ref_logp, np.array(reward), np.array(answer))


@functools.cache
def strings() -> Problem:
    """Fifteen strings of one to three tokens, rewards graded and tied, three answer classes, three policies."""
    reward = [1, 0.9, 0.5, 1, 1, 0, 0.25, 1, 0, 0.9, 0, 1, 0.5, 1, 0]
    answer = [0, 0, -1, 1, 2, -1, -1, 0, -1, 1, -1, 1, -1, 0, -1]
    away = np.stack([enumeration.random_logits(20 + seed, 0.7) for seed in (1, 2, 3)])
    return _problem(enumeration.strings(end=2), enumeration.random_logits(11), away, reward, answer)


@functools.cache
def five() -> Problem:
    """Five outcomes of one token, .60 .30 .05 with reward 1 and .04 .01 with reward 0; each its own answer."""
    away = 0.7 * np.random.default_rng(4).normal(size=(3, 1, 5))
    ref_params = np.log([[0.60, 0.30, 0.05, 0.04, 0.01]])
    return _problem(enumeration.outcomes(5), ref_params, away, [1.0, 1, 1, 0, 0], [0, 1, 2, -1, -1])


class Anchors(NamedTuple):
    """MARA's anchor over the whole set of strings, [1] each; None leaves it to each group."""

    reward: Any
    ref_logp: Any


FROM_GROUP = Anchors(None, None)


def log_mass(problem: Problem, algorithm: config.Algorithm) -> np.ndarray:
    """Exact log Z (reverse) or log M (forward) of every answer class, [1, a] (nats).

    Args:
        problem: reference, rewards and classes.
        algorithm: direction, beta and threshold.
    """
    scale = 1 / max(algorithm.beta, TINY_BETA) if algorithm.kl == "reverse" else 0.0
    weight_n = problem.ref_logp + scale * problem.reward
    good_n = problem.reward >= algorithm.threshold
    rows = [np.where(good_n & (problem.answer == a), weight_n, -np.inf) for a in range(problem.answer.max() + 1)]
    return np.array([[np.logaddexp.reduce(row) for row in rows]])


def anchors(problem: Problem, algorithm: config.Algorithm) -> Anchors:
    """The anchor that a group holding every good string would find.

    Args:
        problem: gives the good strings.
        algorithm: method, anchor, direction and threshold.

    Returns:
        Its reward and log ref(z), or nothing where the method needs none.
    """
    good_n = problem.reward >= algorithm.threshold
    anchor = method_rules.rows(algorithm)[0].anchor
    by_mass = anchor == "answer" and algorithm.kl == "reverse"  # needs no anchor beside the classes' masses
    if anchor is None or by_mass or not good_n.any():
        return FROM_GROUP
    if anchor == "answer":
        good_n = good_n & (problem.answer == np.argmax(log_mass(problem, algorithm)))
    z = int(np.argmax(np.where(good_n, problem.ref_logp, -np.inf)))
    return Anchors(problem.reward[z : z + 1], problem.ref_logp[z : z + 1] if anchor == "string" else None)


def augmented(problem: Problem, algorithm: config.Algorithm) -> tuple[np.ndarray, np.ndarray]:
    """(reward, ref_logp) of all strings, augmented by MARA as one group: the anchor is that of the whole set."""
    anchor = method_rules.rows(algorithm)[0].anchor
    if anchor is None:
        return problem.reward, problem.ref_logp
    settings = {"beta": algorithm.beta, "threshold": algorithm.threshold, "direction": algorithm.kl}
    reward, ref_logp, answer = (jnp.asarray(x)[None] for x in (problem.reward, problem.ref_logp, problem.answer))
    if anchor == "string":
        pair = augment.mara(reward, ref_logp, **settings)
    else:
        pair = augment.mara_answers(reward, ref_logp, answer, jnp.asarray(log_mass(problem, algorithm)), **settings)
    return np.asarray(pair[0][0]), np.asarray(pair[1][0])


def closed_forms(problem: Problem, algorithm: config.Algorithm, group: int = 2) -> dict[str, np.ndarray]:
    """Probabilities of all strings at every optimum that has a closed form.

    Args:
        problem: reference and rewards.
        algorithm: beta and threshold, and the augmentation of the form "crossed".
        group: strings a group, for methods whose optimum depends on it.

    Returns:
        "reverse", "forward"; "own", what the method's row in `core.methods` states, where that is neither; with MARA
        also both with "_mara_string" and "_mara_answer", and "crossed": the KL that was not asked for, beside
        rewards augmented for the one that was.
    """
    beta, threshold = max(algorithm.beta, TINY_BETA), algorithm.threshold
    ref, reward, answer = map(jnp.asarray, (problem.ref_logp, problem.reward, problem.answer))
    forms = {"reverse": targets.reverse_kl(ref, reward, beta), "forward": targets.forward_kl(ref, reward, beta)}
    if method_rules.rows(algorithm)[0].anchor is None:
        forms |= _own(problem, algorithm, group)
        return {name: np.exp(np.asarray(logp)) for name, logp in forms.items()}
    for direction in ("reverse", "forward"):
        forms[f"{direction}_mara_string"] = targets.mara(ref, reward, beta, threshold, direction)
        forms[f"{direction}_mara_answer"] = targets.mara_answers(ref, reward, answer, beta, threshold, direction)
    other = targets.forward_kl if algorithm.kl == "reverse" else targets.reverse_kl
    forms["crossed"] = other(ref, jnp.asarray(augmented(problem, algorithm)[0]), beta)
    return {name: np.exp(np.asarray(logp)) for name, logp in forms.items()}


def _own(problem: Problem, algorithm: config.Algorithm, group: int) -> dict[str, Any]:
    """The optimum of a method that ends at no E[R] - beta KL's, {} where none is known.

    The closed forms of losses that are token by token hold for strings of one token.
    """
    algorithm = method_rules.resolved(algorithm)
    plain = algorithm.transform == "none" and algorithm.objective == "policy_gradient"
    if plain or (problem.strings.tokens.shape[1] > 1 and algorithm.objective != "policy_gradient"):
        return {}
    outcomes = Outcomes(*map(jnp.asarray, (problem.ref_logp, problem.reward, problem.answer)))
    numbers = Numbers(max(algorithm.beta, TINY_BETA), algorithm.threshold, algorithm.eta)
    logp = method_rules.optimum(algorithm, outcomes, numbers, group)
    return {} if logp is None else {"own": logp}
