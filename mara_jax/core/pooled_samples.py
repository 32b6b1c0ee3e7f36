"""Optima of objectives on samples of the reference policy under one prompt, and on bootstrap resamples of them.

The empirical distribution of n samples, each of mass 1/n, replaces the reference policy: the optimum of the objective
on them (core.targets) estimates the optimum itself. The rewards of MARA are those of training (core.augment).

Every objective here treats samples of equal reward and answer alike, so these are pooled into groups j first.
The classes c are the answers and, last, "no answer".
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mara_jax.core import augment, targets
from mara_jax.core.targets import Direction, Scalar

Augmentation = Literal["vanilla", "answers"]
_FEW = 16  # groups
_LEAST = 1e-15  # where Newton starts if the best group's weight is below float32's range
_SMALLEST = 60.0  # nats below 0 of the largest weight, in whose units rewards are then counted
_AT_ONCE = 2**22  # numbers in an array of resamples and groups that is computed at once
_NEWTON = 12  # rounds: after eight 1e-5 is left on the didactic problems and on samples, and each squares the error


class Groups(NamedTuple):
    """Samples of equal reward and answer, pooled: `index` of each sample's group, and the group's reward and answer.

    `unseen` holds the groups of answers without a sample. Other groups without a sample are padding.
    """

    index: Int[np.ndarray, " n"]
    reward: Float[np.ndarray, " j"]
    answer: Int[np.ndarray, " j"]
    unseen: tuple[int, ...]


def pool(reward_n: Float[np.ndarray, " n"], answer_n: Int[np.ndarray, " n"], answers: int) -> Groups:
    """Pools samples of equal reward and answer; each answer without a sample gets an empty group of the best reward.

    Args:
        reward_n: reward of each sample.
        answer_n: class index of each sample, negative for none.
        answers: number of answer classes.

    Returns:
        The groups, ordered by answer and reward; empty ones last.
    """
    reward_n, answer_n = np.asarray(reward_n, np.float64), np.maximum(np.asarray(answer_n), -1)
    pairs_j2, index_n = np.unique(np.stack([answer_n, reward_n], axis=1), axis=0, return_inverse=True)
    unseen = np.setdiff1d(np.arange(answers), answer_n)
    count = len(pairs_j2)
    # Many groups are padded to one number for all objectives, so that they share a compiled program.
    padding = max(len(reward_n) - count, 0) if count > _FEW else 0
    reward_j = np.concatenate([pairs_j2[:, 1], np.full(len(unseen), reward_n.max()), np.full(padding, reward_n.min())])
    answer_j = np.concatenate([pairs_j2[:, 0], unseen, np.full(padding, -1)]).astype(np.int32)
    return Groups(index_n.reshape(-1), reward_j, answer_j, tuple(range(count, count + len(unseen))))


def log_weights(
    log_weight_n: ArrayLike,
    groups: Groups,
    key: PRNGKeyArray,
    resamples: int,
    lift_n: ArrayLike | None = None,
) -> Float[Array, "r j"]:
    """Log-mass of every group, from the samples (row 0) and from `resamples` bootstrap resamples of them.

    Each unseen answer adds a row, in which it has the upper end of Wilson's 95 % interval for no sample in n.

    Args:
        log_weight_n: [n] log of each sample's mass (nats): -log n, or log ref where every outcome is enumerated.
        groups: as from `pool`.
        key: row i of the resamples is a function of it and i alone.
        resamples: 0 for enumerated outcomes, which are no sample.
        lift_n: [n] nats by which the objective lifts each sample (MARA over strings); none by default.

    Returns:
        Log-masses (nats), -inf for an empty group.
    """
    count, total = len(groups.reward), len(groups.index)
    lift_n = np.zeros(total) if lift_n is None else lift_n
    unseen = groups.unseen if resamples else ()
    return _log_weights(log_weight_n, lift_n, groups.index, key, count, resamples, unseen)


@functools.partial(jax.jit, static_argnames=("count", "resamples", "unseen"))
def _log_weights(log_weight_n, lift_n, index_n, key, count: int, resamples: int, unseen: tuple[int, ...]):
    total = index_n.shape[0]
    member_jn = jnp.arange(count)[:, None] == index_n
    lifted_jn = jnp.where(member_jn, jnp.asarray(log_weight_n) + lift_n, -jnp.inf)
    most_j1 = jnp.max(lifted_jn, axis=1, keepdims=True)
    weight_jn = jnp.exp(lifted_jn - jnp.where(jnp.isfinite(most_j1), most_j1, 0.0))
    # The samples, then the resamples. Random bits are a function of (key, position), so the first rows do
    # not depend on the number of rows.
    chosen_rn = jax.random.randint(key, (resamples, total), 0, total)
    times_rn = jax.vmap(lambda chosen_n: jnp.zeros(total).at[chosen_n].add(1.0))(chosen_rn)
    times_rn = jnp.concatenate([jnp.ones((1, total)), times_rn])
    sum_rj = jnp.matmul(times_rn, weight_jn.T, precision=jax.lax.Precision.HIGHEST)
    rows = jnp.where(sum_rj > 0, jnp.log(sum_rj) + most_j1[:, 0], -jnp.inf)
    _, most = augment.wilson_interval(jnp.zeros(()), total)
    return jnp.concatenate([rows, *(rows[:1].at[0, j].set(jnp.log(most)) for j in unseen)])


def segment_logsumexp(value: Float[Array, " n"], index: Int[Array, " n"], segments: int) -> Float[Array, " s"]:
    """log of the sum of exp(value) over the members of each segment; -inf for one without members.

    Args:
        value: logs (nats).
        index: the segment of each.
        segments: how many there are (static).

    Returns:
        One log a segment (nats).
    """
    member_sn = jnp.arange(segments)[:, None] == index
    return jax.nn.logsumexp(jnp.where(member_sn, value, -jnp.inf), axis=-1)


@jax.jit
def string_lift(
    reward_n: Float[Array, " n"], ref_logp_n: Float[Array, " n"], threshold: Scalar
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Samples under MARA over strings: a good one's reward becomes R(z), and its mass is multiplied by ref(z) / ref(y).

    The weights 1 / ref(y) turn samples of the reference into a count of good strings; see `effective_samples`.

    Args:
        reward_n: reward of each sample.
        ref_logp_n: reference log-probability of each whole completion (nats).
        threshold: reward from which a sample is good.

    Returns:
        The rewards, and the nats by which each sample's mass is lifted: the same for both directions of the KL.

    Source:
        Eq. 13 and Algorithm 2, whose optima these are, with z the likeliest good sample.
    """
    reward_1n, ref_1n = jnp.asarray(reward_n)[None], jnp.asarray(ref_logp_n)[None]
    lifted_1n, ref_hat_1n = augment.mara(reward_1n, ref_1n, beta=1.0, threshold=threshold, direction="forward")
    return lifted_1n[0], (ref_hat_1n - ref_1n)[0]


def effective_samples(log_weight_n: ArrayLike) -> float:
    """Effective sample size of weighted samples: (sum of weights)^2 / sum of squared weights.

    Args:
        log_weight_n: [n] log-weights (nats), up to a constant; -inf for a sample that does not count.

    Returns:
        From 1 to n; 0 where no sample counts.
    """
    log_n = np.asarray(log_weight_n, np.float64)
    if not np.any(log_n > -np.inf):
        return 0.0
    weight_n = np.exp(log_n - log_n.max())
    return float(weight_n.sum() ** 2 / np.sum(weight_n**2))


def answer_log_mass(
    log_weight_j: Float[Array, " j"],
    reward_j: Float[Array, " j"],
    answer_j: Int[Array, " j"],
    answers: int,
    beta: Scalar,
    threshold: Scalar,
    direction: Direction,
) -> Float[Array, " a"]:
    """Log-mass of every answer as `core.augment.answer_log_mass` has it, from pooled samples.

    Args:
        log_weight_j: log-mass of each group (nats).
        reward_j: its reward.
        answer_j: its class, negative for none.
        answers: number of classes (static).
        beta: regularisation strength.
        threshold: reward from which a sample is good.
        direction: "reverse" for log Z, "forward" for log M.

    Returns:
        Nats, -inf for a class without a good sample.
    """
    score_j = log_weight_j + reward_j / beta if direction == "reverse" else log_weight_j
    score_j = jnp.where((reward_j >= threshold) & (answer_j >= 0), score_j, -jnp.inf)
    return segment_logsumexp(score_j, jnp.maximum(answer_j, 0), answers)


def optimum_log_mass(
    log_weight_j: Float[Array, " j"],
    reward_j: Float[Array, " j"],
    answer_j: Int[Array, " j"],
    answers: int,
    beta: Scalar,
    direction: Direction,
) -> Float[Array, " c"]:
    """Log-mass of each answer, then of none, at the optimum of E[R] - beta KL on pooled samples (Eq. 3 or 6).

    Args:
        log_weight_j: log-mass of each group under the reference (nats), -inf for an empty one.
        reward_j: its reward.
        answer_j: its class, negative for none.
        answers: number of classes (static).
        beta: regularisation strength, above 0.
        direction: "reverse" or "forward" (static).

    Returns:
        Nats; -inf for a class without mass.
    """
    logp_j = _optimum(log_weight_j, reward_j, beta, direction)
    return segment_logsumexp(logp_j, jnp.where(answer_j < 0, answers, answer_j), answers + 1)


def _optimum(log_weight_j, reward_j, beta, direction):
    if direction == "reverse":
        return targets.reverse_kl(log_weight_j, reward_j, beta)
    return _forward_optimum(log_weight_j, reward_j, beta)


def _forward_optimum(log_weight_j, reward_j, beta):
    """What targets.forward_kl returns for weights that are all above 0 or never count, in a twentieth of the time.

    1 over the sum of w / (x + gap) is concave in x = Lambda - Rmax and nearly straight, so Newton's steps from
    below reach beta in a few rounds; a thousand resamples at a hundred betas need that.
    """
    support_j = log_weight_j > -jnp.inf
    most = jnp.max(log_weight_j)
    weight_j = jnp.exp(log_weight_j - most)
    # x in units of exp(most), so that a lift of a hundred nats does not overflow; nor may weights as small, whose gaps
    # are infinitely large beside them (and 0 times infinity is no gap of 0).
    gap_j = (jnp.max(jnp.where(support_j, reward_j, -jnp.inf)) - reward_j) * jnp.exp(jnp.minimum(-most, _SMALLEST))
    gap_j = jnp.where(support_j, gap_j, jnp.inf)

    def newton(_, x):
        term_j = weight_j / (x + gap_j)
        total, slope = jnp.sum(term_j), jnp.sum(term_j / (x + gap_j))
        return x + total * (beta * total - 1) / slope

    x = jax.lax.fori_loop(0, _NEWTON, newton, jnp.maximum(beta * jnp.sum(jnp.where(gap_j == 0, weight_j, 0.0)), _LEAST))
    return jax.nn.log_softmax(jnp.where(support_j, log_weight_j - jnp.log(x + gap_j), -jnp.inf))


class Outcomes(NamedTuple):
    """Each group of samples: its reward, its class (negative for none), and the log-probability of its
    likeliest sample (nats), which decides on R(z) where good rewards differ; `samples`, how many there are in all."""

    reward: Float[Array, " j"]
    answer: Int[Array, " j"]
    likeliest: Float[Array, " j"]
    samples: int


@functools.partial(jax.jit, static_argnames=("answers", "method", "direction"))
def optimum_mass(
    log_weight_rj: Float[Array, "r j"],
    outcomes: Outcomes,
    beta_b: Float[Array, " b"],
    threshold: Scalar,
    *,
    answers: int,
    method: Augmentation,
    direction: Direction,
) -> Float[Array, "b r c"]:
    """Probability of each answer, then of none, at one objective's optimum: for every beta and row of weights.

    MARA over answers uses the masses of the samples (row 0), as a run measures them once, half a sample for an answer
    without one; each resample stands for a possible reference. So the spread over resamples is that of the optimum
    of a run with these masses.

    Args:
        log_weight_rj: as from `log_weights`.
        outcomes: of each group.
        beta_b: regularisation strengths, above 0.
        threshold: reward from which a sample is good.
        answers: number of classes.
        method: "vanilla" or MARA over "answers"; MARA over strings is "vanilla" on what `string_lift` returns.
        direction: "reverse" or "forward".

    Returns:
        Probabilities, which sum to 1.
    """
    outcomes, threshold = _relative_to_best(outcomes, threshold)

    def at(beta):
        weight_rj, signal_j = log_weight_rj, outcomes.reward
        if method == "answers":
            log_mass_a = _log_mass_of_outcomes(log_weight_rj[0], outcomes, answers, beta, threshold, direction)
            signal_j, lift_j = _answer_lift(log_mass_a, outcomes, beta, threshold, direction)
            weight_rj = weight_rj + lift_j
        logp_rj = jax.vmap(lambda weight_j: _optimum(weight_j, signal_j, beta, direction))(weight_rj)
        return jnp.matmul(jnp.exp(logp_rj), member_jc, precision=jax.lax.Precision.HIGHEST)

    class_j = jnp.where(outcomes.answer < 0, answers, outcomes.answer)
    member_jc = (class_j[:, None] == jnp.arange(answers + 1)).astype(outcomes.reward.dtype)
    return jax.lax.map(at, beta_b)


@functools.partial(jax.jit, static_argnames=("answers", "method", "direction"))
def objective_log_mass(
    log_weight_j: Float[Array, " j"],
    outcomes: Outcomes,
    beta: Scalar,
    threshold: Scalar,
    *,
    answers: int,
    method: Augmentation,
    direction: Direction,
) -> Float[Array, " c"]:
    """The logarithm of `optimum_mass` for one row of weights and one beta, without underflow (nats)."""
    outcomes, threshold = _relative_to_best(outcomes, threshold)
    reward_j = outcomes.reward
    if method == "answers":
        log_mass_a = _log_mass_of_outcomes(log_weight_j, outcomes, answers, beta, threshold, direction)
        reward_j, lift_j = _answer_lift(log_mass_a, outcomes, beta, threshold, direction)
        log_weight_j = log_weight_j + lift_j
    return optimum_log_mass(log_weight_j, reward_j, outcomes.answer, answers, beta, direction)


@functools.partial(jax.jit, static_argnames="direction")
def optimum_logp(
    log_weight_rj: Float[Array, "r j"],
    outcomes: Outcomes,
    beta: Scalar,
    threshold: Scalar,
    log_mass_a: Float[Array, " a"] | None = None,
    *,
    direction: Direction,
) -> Float[Array, "r j"]:
    """Log-probability of each group of samples at one objective's optimum, for every row of weights.

    Args:
        log_weight_rj: log-mass of each group under the reference (nats), -inf for an empty one.
        outcomes: of each group.
        beta: regularisation strength, above 0.
        threshold: reward from which a sample is good.
        log_mass_a: for MARA over answers, the log-mass of every answer as a run has measured it (nats); None for
            vanilla.
        direction: "reverse" or "forward".

    Returns:
        Nats.
    """
    outcomes, threshold = _relative_to_best(outcomes, threshold)
    reward_j = outcomes.reward
    if log_mass_a is not None:
        reward_j, lift_j = _answer_lift(log_mass_a, outcomes, beta, threshold, direction)
        log_weight_rj = log_weight_rj + lift_j
    rows = max(1, _AT_ONCE // log_weight_rj.shape[1])
    return jax.lax.map(lambda weight_j: _optimum(weight_j, reward_j, beta, direction), log_weight_rj, batch_size=rows)


def _relative_to_best(outcomes: Outcomes, threshold):
    """Only differences of rewards matter, and near 0 they keep their digits."""
    best = jnp.max(outcomes.reward)
    return outcomes._replace(reward=outcomes.reward - best), threshold - best


def _log_mass_of_outcomes(log_weight_j, outcomes: Outcomes, answers: int, beta, threshold, direction):
    return answer_log_mass(log_weight_j, outcomes.reward, outcomes.answer, answers, beta, threshold, direction)


def _answer_lift(log_mass_a, outcomes: Outcomes, beta, threshold, direction):
    """Rewards of MARA over answers, and the nats by which it lifts each group's reference."""
    reward_j, answer_j, likeliest_j, samples = outcomes
    known_j = likeliest_j > -jnp.inf
    # A group without a sample comes last, by a nat: beside float32's least number its lift would be rounded away.
    ref_1j = jnp.where(known_j, likeliest_j, jnp.min(likeliest_j, where=known_j, initial=0.0) - 1)[None]
    # Rewards are relative to the best of all samples, which is 0.
    unseen = augment.unseen_log_mass(jnp.zeros((1, 1)), beta, threshold, direction) - jnp.log(samples)
    settings = {"beta": beta, "threshold": threshold, "direction": direction, "unseen_log_mass": unseen}
    signal_1j, ref_hat_1j = augment.mara_answers(reward_j[None], ref_1j, answer_j[None], log_mass_a[None], **settings)
    return signal_1j[0], (ref_hat_1j - ref_1j)[0]
