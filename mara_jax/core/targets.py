"""The distribution that each objective is maximised by, over an enumerated set of outcomes (the last axis).

References may be unnormalised and may be zero (log-probability -inf) on some outcomes. `beta` and `threshold` are in
reward units, log-probabilities in nats; arrays whose last axes differ raise an AssertionError. Equation numbers are
those of the MARA paper's first version.
"""

import functools
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Direction = Literal["reverse", "forward"]
Scalar = float | Float[Array, ""]

# Halving a bracket of at most a few hundred nats this often reaches the spacing of float64.
_BISECTIONS = 64


def check_direction(direction: str) -> None:
    """Refuses an unknown KL direction.

    Args:
        direction: "reverse" or "forward".

    Raises:
        ValueError: when it is neither "reverse" nor "forward".
    """
    if direction not in ("reverse", "forward"):
        raise ValueError(f"direction {direction!r} is not known: use 'reverse' or 'forward'")


def anchor_index(
    ref_logp: Float[Array, "*batch a"], reward: Float[Array, "*batch a"], eligible: Bool[Array, "*batch a"]
) -> Int[Array, "*batch 1"]:
    """The anchor z: the eligible outcome likeliest under the reference, of equally likely ones the best rewarded.

    The paper leaves ties open. Taking the larger reward makes the choice independent of the order of outcomes,
    and the anchor of a batch tend to that of the whole set.

    Args:
        ref_logp: reference log-probabilities (nats).
        reward: reward of each outcome.
        eligible: which outcomes may be the anchor.

    Returns:
        Its index, the last axis kept; it means nothing where no eligible outcome is one the reference reaches.
    """
    eligible_ref = jnp.where(eligible, ref_logp, -jnp.inf)
    likeliest = eligible & (eligible_ref == jnp.max(eligible_ref, axis=-1, keepdims=True))
    return jnp.argmax(jnp.where(likeliest, reward, -jnp.inf), axis=-1, keepdims=True)


@jax.jit
def reverse_kl(
    ref_logp: Float[Array, "*batch a"], reward: Float[Array, "*batch a"], beta: Scalar
) -> Float[Array, "*batch a"]:
    """Optimum of E[R] - beta KL(pi || ref): `ref(y) exp(R(y) / beta)`, normalised (Eq. 3).

    Args:
        ref_logp: reference log-probabilities (nats), -inf where the reference is zero.
        reward: reward of each outcome.
        beta: regularisation strength, above 0.

    Returns:
        Log-probabilities of the optimum (nats).
    """
    ref_logp, reward = jnp.asarray(ref_logp), jnp.asarray(reward)
    chex.assert_equal_shape_suffix([ref_logp, reward], 1)
    best = jnp.max(jnp.where(ref_logp > -jnp.inf, reward, -jnp.inf), axis=-1, keepdims=True)
    score = ref_logp + (reward - best) / beta
    # Second pass around the likeliest outcome: near it both differences are small, so float32 keeps its
    # digits even where all log-probabilities are far from zero.
    mode = jnp.argmax(score, axis=-1, keepdims=True)
    ref_mode = jnp.take_along_axis(ref_logp, mode, axis=-1)
    reward_mode = jnp.take_along_axis(reward, mode, axis=-1)
    return jax.nn.log_softmax((ref_logp - ref_mode) + (reward - reward_mode) / beta, axis=-1)


@jax.custom_jvp
def _log_gap(log_x: Float[Array, "*batch #a"], gap: Float[Array, "*batch a"]) -> Float[Array, "*batch a"]:
    """log(exp(log_x) + gap) for gap >= 0, also where exp(log_x) underflows or gap is 0."""
    return jnp.logaddexp(log_x, jnp.log(gap))


@_log_gap.defjvp
def _log_gap_jvp(primals, tangents):
    # Written out, because the derivative of log(gap) at gap = 0 is infinite though that of the sum is not.
    log_x, gap = primals
    out = _log_gap(log_x, gap)
    return out, jnp.exp(log_x - out) * tangents[0] + jnp.exp(-out) * tangents[1]


def _bisect(log_weight, log_gap, low, high):
    """The log_x in [low, high] at which the sum of exp(log_weight) / (exp(log_x) + exp(log_gap)) is 1."""

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) / 2
        # Exponentials of differences only; where a term overflows, the sum is indeed above 1.
        term = jnp.exp(log_weight - jnp.maximum(middle, log_gap)) / (1 + jnp.exp(-jnp.abs(middle - log_gap)))
        too_low = jnp.sum(term, axis=-1, keepdims=True) > 1
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
    return low + (high - low) / 2


@jax.jit
def forward_kl(
    ref_logp: Float[Array, "*batch a"], reward: Float[Array, "*batch a"], beta: Scalar
) -> Float[Array, "*batch a"]:
    """Optimum of E[R] - beta KL(ref || pi): `beta ref(y) / (Lambda - R(y))` (Eq. 6).

    The unknown is log(Lambda - Rmax), Rmax the best reward that the reference can reach: it lies between
    log(beta ref(best)) and log(beta S), S the sum of the reference, and keeps its digits at any beta. Where a
    better reward lies outside the support of the reference and the probabilities at Lambda equal to that reward sum to
    less than 1, the missing mass is divided equally among the outcomes with that reward (the objective does not
    distinguish them).

    Args:
        ref_logp: reference log-probabilities (nats), -inf where zero; need not be normalised (Algorithm 2).
        reward: reward of each outcome.
        beta: regularisation strength, above 0.

    Returns:
        Log-probabilities of the optimum (nats); differentiable in all three arguments.
    """
    ref_logp, reward = jnp.asarray(ref_logp), jnp.asarray(reward)
    chex.assert_equal_shape_suffix([ref_logp, reward], 1)
    support = ref_logp > -jnp.inf
    log_weight = jnp.log(beta) + ref_logp
    best_in_support = jax.lax.stop_gradient(jnp.max(jnp.where(support, reward, -jnp.inf), axis=-1, keepdims=True))
    best_reward = jnp.max(reward, axis=-1, keepdims=True)
    gap = jnp.where(support, best_in_support - reward, 0.0)  # 0 off the support, where the weight is zero

    def log_sum(log_x):
        return jax.nn.logsumexp(log_weight - _log_gap(log_x, gap), axis=-1, keepdims=True)

    outside = best_reward - best_in_support > 0
    log_least = jnp.log(jnp.where(outside, best_reward - best_in_support, 1.0))
    has_excess = outside & (log_sum(log_least) < 0)

    low = jax.nn.logsumexp(jnp.where(gap == 0, log_weight, -jnp.inf), axis=-1, keepdims=True)
    low = jnp.where(outside, jnp.maximum(low, log_least), low)
    high = jnp.maximum(jax.nn.logsumexp(log_weight, axis=-1, keepdims=True), low)
    root = _bisect(*jax.lax.stop_gradient((log_weight, jnp.log(gap), low, high)))
    # One Newton step: it changes the root by rounding only, and gives it its (implicit) derivative.
    at_root = log_weight - _log_gap(root, gap)
    slope = jnp.sum(jnp.exp(at_root + root - _log_gap(root, gap)), axis=-1, keepdims=True)
    slope = jax.lax.stop_gradient(jnp.maximum(slope, jnp.finfo(slope.dtype).tiny))
    root = root + jax.nn.logsumexp(at_root, axis=-1, keepdims=True) / slope

    inside = log_weight - _log_gap(jnp.where(has_excess, log_least, root), gap)
    total = jax.nn.logsumexp(inside, axis=-1, keepdims=True)
    log_missing = jnp.log(-jnp.expm1(jnp.where(has_excess, total, -1.0)))
    receivers = (reward == best_reward) & ~support
    count = jnp.maximum(jnp.sum(receivers, axis=-1, keepdims=True), 1)
    with_excess = jnp.where(receivers, log_missing - jnp.log(count), inside)
    return jnp.where(has_excess, with_excess, inside - total)


def _optimum(ref_logp, reward, beta, direction):
    check_direction(direction)
    return (reverse_kl if direction == "reverse" else forward_kl)(ref_logp, reward, beta)


@functools.partial(jax.jit, static_argnames="direction")
def mara(
    ref_logp: Float[Array, "*batch a"],
    reward: Float[Array, "*batch a"],
    beta: Scalar,
    threshold: Scalar,
    direction: Direction = "reverse",
) -> Float[Array, "*batch a"]:
    """Optimum under mode-anchored reward augmentation, anchored over the whole good set (Eq. 13).

    Every good outcome (reward >= threshold) counts with the reference and the reward of the anchor, the good
    outcome likeliest under the reference (`anchor_index`); so all good outcomes end equal, those of reference
    zero included. The sum of the reference then is no longer 1 and stays so. Without a good outcome that the
    reference can reach, the result is the unaugmented optimum.

    Args:
        ref_logp: reference log-probabilities (nats).
        reward: reward of each outcome.
        beta: regularisation strength, above 0.
        threshold: reward from which an outcome is good.
        direction: "reverse" (Eq. 13) or "forward" (Algorithm 2).

    Returns:
        Log-probabilities of the optimum (nats).

    Raises:
        ValueError: for an unknown direction.
    """
    ref_logp, reward = jnp.asarray(ref_logp), jnp.asarray(reward)
    chex.assert_equal_shape_suffix([ref_logp, reward], 1)
    good = reward >= threshold
    anchor = anchor_index(ref_logp, reward, good)
    anchor_ref = jnp.take_along_axis(ref_logp, anchor, axis=-1)
    reachable = jnp.any(good & (ref_logp > -jnp.inf), axis=-1, keepdims=True)
    lifted = good & reachable
    ref_logp = jnp.where(lifted, anchor_ref, ref_logp)
    reward = jnp.where(lifted, jnp.take_along_axis(reward, anchor, axis=-1), reward)
    return _optimum(ref_logp, reward, beta, direction)


@functools.partial(jax.jit, static_argnames="direction")
def mara_answers(
    ref_logp: Float[Array, "*batch a"],
    reward: Float[Array, "*batch a"],
    answer: Int[Array, "*batch a"],
    beta: Scalar,
    threshold: Scalar,
    direction: Direction = "reverse",
) -> Float[Array, "*batch a"]:
    """Optimum under MARA over answers: equal mass for every class, the reference's proportions inside.

    Good outcomes (reward >= threshold) of a class share its mass: Z_a = sum ref exp(R / beta) for reverse KL,
    M_a = sum ref for forward KL. The anchor class has the largest; for forward KL the reward of all good
    outcomes becomes that of the anchor class's likeliest one. Classes that the reference never reaches keep
    mass zero.

    Args:
        ref_logp: reference log-probabilities (nats).
        reward: reward of each outcome.
        answer: class index of each outcome; a negative one means no answer and is never augmented.
        beta: regularisation strength, above 0.
        threshold: reward from which an outcome is good.
        direction: "reverse" or "forward".

    Returns:
        Log-probabilities of the optimum (nats); the unaugmented optimum where no good outcome has an answer.

    Raises:
        ValueError: for an unknown direction.
    """
    check_direction(direction)
    ref_logp, reward, answer = jnp.asarray(ref_logp), jnp.asarray(reward), jnp.asarray(answer)
    chex.assert_equal_shape_suffix([ref_logp, reward, answer], 1)
    good = (reward >= threshold) & (answer >= 0) & (ref_logp > -jnp.inf)
    if direction == "forward":
        return _forward_answers(ref_logp, reward, answer, good, beta)
    augmented = _reverse_answers(ref_logp, reward, answer, good, beta)
    return jnp.where(jnp.any(good, axis=-1, keepdims=True), augmented, reverse_kl(ref_logp, reward, beta))


def _same_class(answer: Int[Array, "*batch a"], good: Bool[Array, "*batch a"]) -> Bool[Array, "*batch a a"]:
    return good[..., :, None] & good[..., None, :] & (answer[..., :, None] == answer[..., None, :])


def _reverse_answers(ref_logp, reward, answer, good, beta):
    same = _same_class(answer, good)
    support = ref_logp > -jnp.inf
    finite = jnp.where(support, ref_logp, 0.0)
    # Log of the weight of j over that of i, from differences only, which keep their digits where R / beta is large.
    pairs = (finite[..., None, :] - finite[..., :, None]) + (reward[..., None, :] - reward[..., :, None]) / beta
    log_share = -jax.nn.logsumexp(jnp.where(same | ~good[..., :, None], pairs, -jnp.inf), axis=-1)
    best = jnp.max(jnp.where(good, reward, -jnp.inf), axis=-1, keepdims=True)
    log_mass = jnp.where(good, finite + (reward - best) / beta - log_share, -jnp.inf)
    z = jnp.take_along_axis(answer, jnp.argmax(log_mass, axis=-1, keepdims=True), axis=-1)
    # A good outcome's score is its share of its class; any other's its weight over that of the anchor class. (Without
    # a good outcome the result is not used, and comparing each outcome with itself keeps it finite.)
    in_anchor = (good & (answer == z))[..., None, :]
    alone = jnp.eye(reward.shape[-1], dtype=bool) & ~jnp.any(good, axis=-1)[..., None, None]
    members = jnp.where(good[..., :, None], same, in_anchor) | alone
    score = -jax.nn.logsumexp(jnp.where(members, pairs, -jnp.inf), axis=-1)
    score = jnp.where(support, score, -jnp.inf)
    # An outcome without an answer may outweigh the anchor class by far: then compare with it instead.
    rival = jnp.argmax(jnp.where(good, -jnp.inf, score), axis=-1, keepdims=True)
    lead = jnp.take_along_axis(score, rival, axis=-1)
    beside_rival = jnp.take_along_axis(pairs, rival[..., None], axis=-2)[..., 0, :]
    score = jnp.where(lead > 0, jnp.where(good, score - lead, beside_rival), score)
    return jax.nn.log_softmax(jnp.where(support, score, -jnp.inf), axis=-1)


def _forward_answers(ref_logp, reward, answer, good, beta):
    same = _same_class(answer, good)
    log_mass = jax.nn.logsumexp(jnp.where(same, ref_logp[..., None, :], -jnp.inf), axis=-1)
    log_mass = jnp.where(good, log_mass, -jnp.inf)
    anchor = jnp.max(log_mass, axis=-1, keepdims=True)
    in_anchor = good & (log_mass == anchor)
    likeliest = anchor_index(ref_logp, reward, in_anchor)
    shift = jnp.where(good, anchor - jnp.where(good, log_mass, 0.0), 0.0)
    lifted_reward = jnp.where(good, jnp.take_along_axis(reward, likeliest, axis=-1), reward)
    return forward_kl(ref_logp + shift, lifted_reward, beta)


def log_ratio(
    ref_logp_1: Float[Array, "*batch"],
    reward_1: Float[Array, "*batch"],
    ref_logp_2: Float[Array, "*batch"],
    reward_2: Float[Array, "*batch"],
    beta: Scalar,
) -> Float[Array, "*batch"]:
    """log G(y1) / G(y2) of two outcomes under the reverse-KL optimum, in nats (Eq. 8).

    Args:
        ref_logp_1: reference log-probability of the first outcome (nats).
        reward_1: its reward.
        ref_logp_2: reference log-probability of the second outcome (nats).
        reward_2: its reward.
        beta: regularisation strength, above 0.

    Returns:
        The log-ratio (nats); no normalising constant is needed.
    """
    return (ref_logp_1 - ref_logp_2) + (reward_1 - reward_2) / beta


def tie_beta(
    ref_logp_1: Float[Array, "*batch"],
    reward_1: Float[Array, "*batch"],
    ref_logp_2: Float[Array, "*batch"],
    reward_2: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """The beta at which two outcomes are equally likely under the reverse-KL optimum (Eq. 11).

    Args:
        ref_logp_1: reference log-probability of the first outcome (nats).
        reward_1: its reward.
        ref_logp_2: reference log-probability of the second outcome (nats).
        reward_2: its reward.

    Returns:
        That beta (reward units); zero or less, or not finite, where no positive beta makes them equal.
    """
    return jnp.asarray(reward_2 - reward_1) / jnp.asarray(ref_logp_1 - ref_logp_2)
