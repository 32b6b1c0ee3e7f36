"""Optima estimated from completions that other policies drew, each weighted to stand for the reference policy.

A run stores completions of the policies that it passed through. For one that the policy pi_t of step t drew,

    E[ref(y) / pi_t(y) f(y)] = sum over y of ref(y) f(y),

whatever came before step t, so that weighted completions of all steps together are samples of the reference policy, and
its optimum on them (core.targets) is the forecast, as `core.forecast` has it for plain samples. Weights are divided by
their sum. The expectation of a weight is 1: a mean below 1 is the share of the reference that the policies still reach.

Each completion has the weight of the policy that drew it. The balance heuristic, ref(y) over the mean of all pi_t(y),
varies less, but needs every step's probability of every completion, and only that of its own step is stored. Filling it
in where a completion came up again would choose the weights by what was drawn. Weights are not truncated either: that
would move the estimate toward the policy, unseen, where the effective sample size shows a large weight for what it is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mara_jax.core import augment, pooled_samples
from mara_jax.core.forecast import Objective
from mara_jax.core.targets import Direction


class Weighted(NamedTuple):
    """n completions of any policies under one prompt: `reward`; `answer`, its class, negative for none; `ref_logp` of
    the whole completion (nats); `log_weight`, log of reference over the policy that drew it (nats)."""

    reward: Float[np.ndarray, " n"]
    answer: Int[np.ndarray, " n"]
    ref_logp: Float[np.ndarray, " n"]
    log_weight: Float[np.ndarray, " n"]


class OfReference(NamedTuple):
    """What weights to the reference policy say: `effective_samples`, (sum w)^2 / sum w^2; `mean_weight`, 1 but for
    chance where the policies reach all that the reference does; `standard_error` of that mean."""

    effective_samples: float
    mean_weight: float
    standard_error: float


class Optimum(NamedTuple):
    """An optimum on the completions (row 0) and on bootstrap resamples of them: expected `reward` (reward units);
    `good`, the probability of a good completion; `mass` of each answer, then of none. `effective_samples`: of the
    completions' weights to the optimum."""

    reward: Float[np.ndarray, " r"]
    good: Float[np.ndarray, " r"]
    mass: Float[np.ndarray, "r c"]
    effective_samples: float


def log_weights(logp_n: Float[np.ndarray, " n"], ref_logp_n: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Log of each completion's importance weight: reference over the policy that drew it.

    Args:
        logp_n: log-probability of each whole completion under the policy that drew it (nats).
        ref_logp_n: the same under the reference policy.

    Returns:
        Nats.
    """
    return np.asarray(ref_logp_n, np.float64) - np.asarray(logp_n, np.float64)


def of_reference(samples: Weighted) -> OfReference:
    """How well the completions stand for the reference policy.

    Args:
        samples: under one prompt.

    Returns:
        Effective sample size, and the mean weight with its standard error (infinite for one completion).
    """
    weight_n = np.exp(np.minimum(samples.log_weight, 700.0))
    error = np.std(weight_n, ddof=1) / np.sqrt(len(weight_n)) if len(weight_n) > 1 else np.inf
    return OfReference(pooled_samples.effective_samples(samples.log_weight), float(np.mean(weight_n)), float(error))


def measured_log_mass(
    objective: Objective, reward_n: Float[np.ndarray, " n"], answer_n: Int[np.ndarray, " n"], answers: int
) -> Float[np.ndarray, " a"]:
    """Log-mass of every answer as a run reads it from its own samples of the reference policy.

    Args:
        objective: its beta, threshold and direction.
        reward_n: reward of each sample.
        answer_n: its class, negative for none.
        answers: number of classes.

    Returns:
        Nats, up to a constant; an answer without a good sample has the mass of half a sample, and all are -inf where no
        sample is good.
    """
    best, threshold = np.max(reward_n), _in_float32(objective.threshold)
    # Only differences of rewards matter, and near 0 they keep their digits.
    mass_a, unseen = _measured(
        jnp.asarray(reward_n - best, float), jnp.asarray(answer_n), objective.beta, threshold - best,
        answers=answers, direction=objective.direction,
    )  # fmt: skip
    mass_a = np.asarray(mass_a, np.float64)
    seen_a = mass_a > -np.inf
    return np.where(seen_a, mass_a, float(unseen)) if seen_a.any() else mass_a


@functools.partial(jax.jit, static_argnames=("answers", "direction"))
def _measured(reward_n, answer_n, beta, threshold, *, answers: int, direction: Direction):
    settings = beta, threshold, direction
    mass_1a = augment.answer_log_mass(reward_n[None], answer_n[None], answers, *settings)
    return mass_1a[0], augment.unseen_log_mass(reward_n[None], *settings)[0]


class _Groups(NamedTuple):
    """Completions of equal reward and answer, pooled and padded to a power of two: `index` of each completion's group;
    its reward, its reward as the objective has it, its class, and the log-probability of its likeliest completion."""

    index: np.ndarray
    reward: np.ndarray
    signal: np.ndarray
    answer: np.ndarray
    likeliest: np.ndarray


def optimum(
    objective: Objective,
    samples: Weighted,
    answers: int,
    *,
    log_mass_a: Float[np.ndarray, " a"] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Optimum:
    """An objective's optimum, from weighted completions under one prompt.

    The effective sample size is that of the weights to the *optimum*: a completion that stands for much of the
    reference counts for little where the objective gives it no mass, and the other way round.

    Args:
        objective: whose optimum; its beta is above 0.
        samples: the completions.
        answers: number of classes.
        log_mass_a: for MARA over answers, the masses that a run has measured (nats), as from `measured_log_mass`: the
            optimum is then that of a run which uses them; by default those of the completions.
        resamples: of the bootstrap.
        seed: of the resamples.

    Returns:
        The optimum.
    """
    objective = objective._replace(threshold=_in_float32(objective.threshold))
    signal_n, lift_n = samples.reward, np.zeros(len(samples.reward))
    if objective.method == "strings":
        lifted = pooled_samples.string_lift(
            jnp.asarray(samples.reward, float), jnp.asarray(samples.ref_logp), objective.threshold
        )
        signal_n, lift_n = (np.asarray(one, np.float64) for one in lifted)
    groups = _pool(samples, signal_n)
    log_weight_rj = _log_mass(samples.log_weight, lift_n, groups, resamples, np.random.default_rng(seed))
    if objective.method == "answers" and log_mass_a is None:
        log_mass_a = _own_log_mass(objective, groups, log_weight_rj[0], answers)
    logp_rj = _optimum_logp(objective, groups, log_weight_rj, log_mass_a)
    p_rj = np.exp(logp_rj)
    class_j = np.where(groups.answer < 0, answers, groups.answer)
    mass_cr = np.array([p_rj[:, class_j == c].sum(axis=1) for c in range(answers + 1)])
    per_mass_n = logp_rj[0, groups.index] - log_weight_rj[0, groups.index]
    return Optimum(
        p_rj @ groups.reward,
        p_rj @ (groups.reward >= objective.threshold),
        mass_cr.T,
        pooled_samples.effective_samples(samples.log_weight + lift_n + per_mass_n),
    )


def _in_float32(threshold: float) -> float:
    """The threshold as training compares it: a stored reward of .7 is 1e-8 below .7."""
    return float(np.float32(threshold))


def _optimum_logp(objective: Objective, groups: _Groups, log_weight_rj: np.ndarray, log_mass_a) -> np.ndarray:
    """[r, j] Log-probability of each group at the optimum (nats)."""
    if objective.method == "answers":
        unused = _power_of_two(len(log_mass_a)) - len(log_mass_a)
        log_mass_a = jnp.asarray(np.append(log_mass_a, np.full(unused, -np.inf)), float)
    outcomes = pooled_samples.Outcomes(
        jnp.asarray(groups.signal, float),
        jnp.asarray(groups.answer),
        jnp.asarray(groups.likeliest, float),
        len(groups.index),
    )
    logp_rj = pooled_samples.optimum_logp(
        jnp.asarray(log_weight_rj, float),
        outcomes,
        objective.beta,
        objective.threshold,
        log_mass_a if objective.method == "answers" else None,
        direction=objective.direction,
    )
    return np.asarray(logp_rj, np.float64)


def _own_log_mass(objective: Objective, groups: _Groups, log_weight_j: np.ndarray, answers: int) -> np.ndarray:
    """[a] The masses of answers by the completions themselves, with rewards relative to the best."""
    best = groups.reward.max()
    log_mass_a = pooled_samples.answer_log_mass(
        jnp.asarray(log_weight_j, float),
        jnp.asarray(groups.reward - best, float),
        jnp.asarray(groups.answer),
        answers,
        objective.beta,
        objective.threshold - best,
        objective.direction,
    )
    return np.asarray(log_mass_a)


def _power_of_two(count: int) -> int:
    """The least one from `count` on: few shapes, so that prompts share compiled programs."""
    return 1 << (count - 1).bit_length()


def _pool(samples: Weighted, signal_n: np.ndarray) -> _Groups:
    pairs_n2 = np.stack([np.maximum(samples.answer, -1), samples.reward], axis=1).astype(np.float64)
    pairs_j2, first_j, index_n = np.unique(pairs_n2, axis=0, return_index=True, return_inverse=True)
    index_n, count = index_n.reshape(-1), len(pairs_j2)
    padding = _power_of_two(count) - count
    likeliest_j = np.full(count + padding, -np.inf)
    np.maximum.at(likeliest_j, index_n, samples.ref_logp)
    signal_j = np.asarray(signal_n, np.float64)[first_j]
    return _Groups(
        index_n,
        np.append(pairs_j2[:, 1], np.full(padding, pairs_j2[:, 1].min())),
        np.append(signal_j, np.full(padding, signal_j.min())),
        np.append(pairs_j2[:, 0], np.full(padding, -1)).astype(np.int32),
        likeliest_j,
    )


def _log_mass(log_weight_n, lift_n, groups: _Groups, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[1 + resamples, j] log-mass of each group (nats), weights divided by their sum before they are lifted."""
    count, most = len(groups.reward), np.max(log_weight_n)
    lifted_n = log_weight_n + lift_n
    most_j = np.full(count, -np.inf)
    np.maximum.at(most_j, groups.index, lifted_n)
    base_n, weight_n = np.exp(log_weight_n - most), np.exp(lifted_n - most_j[groups.index])
    rows = []
    for resample in range(resamples + 1):
        chosen = rng.integers(0, len(base_n), len(base_n)) if resample else slice(None)
        sum_j = np.bincount(groups.index[chosen], weight_n[chosen], count)
        with np.errstate(divide="ignore"):
            rows.append(np.log(sum_j) + np.where(sum_j > 0, most_j - most, 0.0) - np.log(base_n[chosen].sum()))
    return np.stack(rows)
