"""Mode-anchored reward augmentation (MARA) over strings and over answers: the reward transform before advantages.

Each function maps (reward_pg, ref_logp_pg) of a batch of groups to the pair that the objective uses.
Rewards are in reward units, log-probabilities of whole completions in nats.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mara_jax.core.targets import Direction, Scalar, anchor_index, check_direction


def mara(
    reward_pg: Float[Array, "p g"],
    ref_logp_pg: Float[Array, "p g"],
    *,
    beta: Scalar,
    threshold: Scalar,
    direction: Direction = "reverse",
    anchor_reward: Scalar | Float[Array, " p"] | None = None,
    anchor_ref_logp: Scalar | Float[Array, " p"] | None = None,
) -> tuple[Float[Array, "p g"], Float[Array, "p g"]]:
    """Mode-anchored reward augmentation of each group (row).

    The anchor z is the row's good sample (reward >= threshold) likeliest under the reference (of equally likely
    ones the best rewarded), unless one is given. For "reverse" (Algorithm 1) a good sample's reward becomes
    R(z) + beta (log ref(z) - log ref(y)); for "forward" (Algorithm 2) its reward becomes R(z) and its reference
    ref(z). Other samples, and rows without a good sample, are unchanged.

    Args:
        reward_pg: reward of each sample.
        ref_logp_pg: reference log-probability of each whole completion (nats).
        beta: the regularisation strength of the objective that follows; the two must be the same number.
        threshold: reward from which a sample is good.
        direction: the KL of the objective that follows.
        anchor_reward: R(z) of an anchor taken over the whole good set, one number or one a row.
        anchor_ref_logp: log ref(z) of that anchor (nats); give both or none.

    Returns:
        Rewards and reference log-probabilities for the objective. A good sample that the reference gives zero
        is returned, for "reverse", as (R(z) + beta log ref(z), 0): the same signal, with the two infinities
        cancelled.

    Raises:
        ValueError: for an unknown direction, or an anchor of which only one value is given.
        AssertionError: arrays of different shapes, which broadcasting would mix silently.
    """
    check_direction(direction)
    if (anchor_reward is None) != (anchor_ref_logp is None):
        raise ValueError("an anchor needs both anchor_reward and anchor_ref_logp: give both, or neither")
    reward_pg, ref_logp_pg = jnp.asarray(reward_pg), jnp.asarray(ref_logp_pg)
    chex.assert_equal_shape([reward_pg, ref_logp_pg])
    good = reward_pg >= threshold
    if anchor_reward is None or anchor_ref_logp is None:
        index = anchor_index(ref_logp_pg, reward_pg, good)
        anchor_reward = jnp.take_along_axis(reward_pg, index, axis=-1)
        anchor_ref_logp = jnp.take_along_axis(ref_logp_pg, index, axis=-1)
        # Without a good sample that the reference can reach the index is arbitrary, and nothing is augmented.
        good = good & jnp.any(good & (ref_logp_pg > -jnp.inf), axis=-1, keepdims=True)
    else:
        anchor_reward = jnp.broadcast_to(jnp.asarray(anchor_reward), reward_pg.shape[:-1])[..., None]
        anchor_ref_logp = jnp.broadcast_to(jnp.asarray(anchor_ref_logp), reward_pg.shape[:-1])[..., None]
    if direction == "forward":
        return jnp.where(good, anchor_reward, reward_pg), jnp.where(good, anchor_ref_logp, ref_logp_pg)
    ref_logp_pg = jnp.where(good & (ref_logp_pg == -jnp.inf), 0.0, ref_logp_pg)
    gap_pg = jnp.where(good, anchor_ref_logp - ref_logp_pg, 0.0)
    return jnp.where(good, anchor_reward + beta * gap_pg, reward_pg), ref_logp_pg


def mara_answers(
    reward_pg: Float[Array, "p g"],
    ref_logp_pg: Float[Array, "p g"],
    answer_pg: Int[Array, "p g"],
    log_mass_pa: Float[Array, "p a"],
    *,
    beta: Scalar,
    threshold: Scalar,
    direction: Direction = "reverse",
    unseen_log_mass: Scalar | Float[Array, " p"] | None = None,
    anchor_reward: Scalar | Float[Array, " p"] | None = None,
) -> tuple[Float[Array, "p g"], Float[Array, "p g"]]:
    """Augmentation that equalises answer classes and keeps the reference's proportions inside a class.

    With z the class of largest mass, a good sample of class a gets, for "reverse", the reward
    R(y) + beta (log Z_z - log Z_a) and, for "forward", the reward R(z) and the reference ref(y) M_z / M_a.

    Args:
        reward_pg: reward of each sample.
        ref_logp_pg: reference log-probability of each whole completion (nats).
        answer_pg: answer class of each sample; a negative index means no answer and is never augmented.
        log_mass_pa: log Z ("reverse") or log M ("forward") of each class under each prompt, as
            `answer_log_mass` returns it; -inf for a class without a good sample.
        beta: the regularisation strength of the objective that follows (and of log Z).
        threshold: reward from which a sample is good.
        direction: the KL of the objective that follows.
        unseen_log_mass: log-mass of a class that is -inf in `log_mass_pa` (nats), one number or one a row, as the
            function of that name returns it; by default half of the smallest mass of that prompt's classes.
        anchor_reward: R(z) for "forward", one number or one a row; by default the reward of the row's
            likeliest good sample, of class z where the row has one. It matters only where good rewards
            differ.

    Returns:
        Rewards and reference log-probabilities for the objective. A prompt under which no class has a mass is left
        unchanged: all answers would count alike.

    Raises:
        ValueError: for an unknown direction.
        AssertionError: samples of different shapes, or log-masses that are not one row a prompt.
    """
    check_direction(direction)
    reward_pg, ref_logp_pg, log_mass_pa = map(jnp.asarray, (reward_pg, ref_logp_pg, log_mass_pa))
    answer_pg = jnp.asarray(answer_pg)
    chex.assert_equal_shape([reward_pg, ref_logp_pg, answer_pg])
    chex.assert_equal_rank([reward_pg, log_mass_pa])
    largest_p1 = jnp.max(log_mass_pa, axis=-1, keepdims=True)
    known_p1, seen_pa = largest_p1 > -jnp.inf, log_mass_pa > -jnp.inf
    if unseen_log_mass is None:
        unseen_log_mass = jnp.min(jnp.where(seen_pa, log_mass_pa, jnp.inf), axis=-1) - math.log(2.0)
    unseen_p1 = jnp.broadcast_to(jnp.asarray(unseen_log_mass), reward_pg.shape[:-1])[..., None]
    relative_pa = jnp.where(seen_pa, log_mass_pa, unseen_p1) - jnp.where(known_p1, largest_p1, 0.0)
    good = (reward_pg >= threshold) & (answer_pg >= 0) & known_p1
    bonus_pg = -jnp.take_along_axis(relative_pa, jnp.maximum(answer_pg, 0), axis=-1)
    if direction == "reverse":
        return jnp.where(good, reward_pg + beta * bonus_pg, reward_pg), ref_logp_pg
    if anchor_reward is None:
        in_anchor = good & (answer_pg == jnp.argmax(log_mass_pa, axis=-1, keepdims=True))
        preferred = jnp.where(jnp.any(in_anchor, axis=-1, keepdims=True), in_anchor, good)
        index = anchor_index(ref_logp_pg, reward_pg, preferred)
        anchor_p1 = jnp.take_along_axis(reward_pg, index, axis=-1)
    else:
        anchor_p1 = jnp.broadcast_to(jnp.asarray(anchor_reward), reward_pg.shape[:-1])[..., None]
    return jnp.where(good, anchor_p1, reward_pg), jnp.where(good, ref_logp_pg + bonus_pg, ref_logp_pg)


def answer_log_mass(
    reward: Float[Array, "p n"],
    answer: Int[Array, "p n"],
    num_answers: int,
    beta: Scalar,
    threshold: Scalar,
    direction: Direction = "reverse",
) -> Float[Array, "p a"]:
    """Log-mass of every answer class, estimated from n samples of the reference per prompt.

    Args:
        reward: reward of each reference sample.
        answer: its class; negative where it has none.
        num_answers: number of classes (static).
        beta: regularisation strength (unused for "forward").
        threshold: reward from which a sample is good.
        direction: "reverse" for log Z_a = log (1/n) sum of exp(R / beta) over the good samples of the class,
            "forward" for log M_a = log of their share among all n.

    Returns:
        One row of log-masses per prompt (nats), -inf for a class without a good sample.

    Raises:
        ValueError: for an unknown direction.
    """
    check_direction(direction)
    reward_pn, class_pn = _good_classes(reward, answer, num_answers, threshold)
    weight_pn = reward_pn / beta if direction == "reverse" else jnp.zeros_like(reward_pn)

    def of_prompt(weight_n, class_n):
        # Each class is summed relative to its own largest weight. Scattered: no array of samples times classes.
        largest_a = jnp.full(num_answers, -jnp.inf, weight_n.dtype).at[class_n].max(weight_n, mode="drop")
        relative_n = weight_n - largest_a.at[class_n].get(mode="fill", fill_value=jnp.inf)
        sum_a = jnp.zeros_like(largest_a).at[class_n].add(jnp.exp(relative_n), mode="drop")
        return jnp.where(sum_a > 0, largest_a + jnp.log(jnp.where(sum_a > 0, sum_a, 1.0)), -jnp.inf)

    return jax.vmap(of_prompt)(weight_pn, class_pn) - math.log(reward_pn.shape[-1])


def unseen_log_mass(
    reward: Float[Array, "p n"], beta: Scalar, threshold: Scalar, direction: Direction = "reverse"
) -> Float[Array, " p"]:
    """Log-mass of an answer class that is not among a prompt's n samples of the reference: that of half a sample.

    Args:
        reward: reward of each reference sample.
        beta: regularisation strength (unused for "forward").
        threshold: reward from which a sample is good.
        direction: "reverse" for log (exp(R / beta) / 2n), with R the largest good reward among the prompt's samples
            (the threshold where none is good), "forward" for log (1 / 2n).

    Returns:
        One log-mass per prompt (nats).

    Raises:
        ValueError: for an unknown direction.
    """
    check_direction(direction)
    best_p = jnp.maximum(jnp.max(jnp.asarray(reward), axis=-1), threshold)
    log_half = math.log(0.5 / reward.shape[-1])
    return best_p / beta + log_half if direction == "reverse" else jnp.full_like(best_p, log_half)


def answer_shares(
    reward: Float[Array, "p n"],
    answer: Int[Array, "p n"],
    num_answers: int,
    threshold: Scalar,
    confidence: float = 0.95,
) -> tuple[Float[Array, "p a"], Float[Array, "p a"], Float[Array, "p a"]]:
    """Share of the samples that are good and of each class, with Wilson's score interval.

    Args:
        reward: reward of each reference sample.
        answer: its class; negative where it has none.
        num_answers: number of classes (static).
        threshold: reward from which a sample is good.
        confidence: two-sided coverage of the interval, between 0 and 1.

    Returns:
        Share, lower and upper end for every prompt and class, each between 0 and 1.
    """
    reward_pn, class_pn = _good_classes(reward, answer, num_answers, threshold)
    total = reward_pn.shape[-1]
    empty_a = jnp.zeros(num_answers, reward_pn.dtype)
    count_pa = jax.vmap(lambda class_n: empty_a.at[class_n].add(1.0, mode="drop"))(class_pn)
    low, high = wilson_interval(count_pa, total, confidence)
    return count_pa / total, low, high


def wilson_interval(
    count: Float[Array, "*batch"], total: int, confidence: float = 0.95
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Wilson's score interval for a share seen `count` times in `total` independent samples.

    Args:
        count: how often it was seen.
        total: number of samples, above 0.
        confidence: two-sided coverage, between 0 and 1.

    Returns:
        Lower and upper end, between 0 and 1; the lower is 0 for a count of 0, the upper still above 0.
    """
    z = jax.scipy.special.ndtri((1 + confidence) / 2)
    share = jnp.asarray(count) / total
    centre = share + z**2 / (2 * total)
    half = z * jnp.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    scale = 1 + z**2 / total
    return jnp.clip((centre - half) / scale, 0.0, 1.0), jnp.clip((centre + half) / scale, 0.0, 1.0)


def _good_classes(reward, answer, num_answers: int, threshold):
    """Rewards as an array, and the class of each sample: `num_answers`, out of range, where it is bad or has none."""
    reward, answer = jnp.asarray(reward), jnp.asarray(answer)
    return reward, jnp.where((reward >= threshold) & (answer >= 0), answer, num_answers)
