"""Good answers as modes: their mass at an objective's optimum, and when one that is no longer given counts as lost."""

import numpy as np
from jaxtyping import Float, Int

from mara_jax.core.forecast import LEAST_BETA, Objective

SHARE = 0.1  # of its mass at the optimum: an answer below it is lost
CHANCE = 0.01  # at which an answer just at SHARE would be called lost
_HALVINGS = 100


def optimum_mass(
    objective: Objective, reward_n: Float[np.ndarray, " n"], answer_n: Int[np.ndarray, " n"], answers: int
) -> Float[np.ndarray, " a"]:
    """Probability of each good answer at the optimum of an objective, estimated from samples of the reference policy.

    The mass of an answer is that of its good completions; all others count as having none. An answer without a good
    sample counts as half a sample of the best reward. As `forecast.class_log_mass`, without a compiled program: the
    number of answers changes as they are discovered, and no device is waited for.

    Args:
        objective: "vanilla", or MARA over "answers".
        reward_n: reward of each sample, at least one of them with an answer and good.
        answer_n: index of its answer, negative for none.
        answers: how many there are.

    Returns:
        [a] probabilities; with that of all other completions they sum to 1.

    Raises:
        ValueError: no sample is good, or the objective is MARA over strings, whose optimum samples do not show.

    Source:
        Eq. 3 and 6, with MARA's rewards over answers, on the empirical distribution of the samples.
    """
    if objective.method == "strings":
        raise ValueError("the optimum of MARA over strings is not known from samples: ask forecast.class_log_mass")
    # Rewards are float32, in which training compares them with the threshold.
    good_n = (np.asarray(reward_n, np.float32) >= np.float32(objective.threshold)) & (np.asarray(answer_n) >= 0)
    reward_n, beta = np.asarray(reward_n, np.float64), max(objective.beta, LEAST_BETA)
    if not good_n.any():
        raise ValueError("no sample of the reference policy is good, so that the optimum is not known")
    unseen = np.setdiff1d(np.arange(answers), np.asarray(answer_n)[good_n])
    class_n = np.concatenate([np.where(good_n, answer_n, answers), unseen])
    weight_n = np.concatenate([np.ones(len(reward_n)), np.full(len(unseen), 0.5)]) / len(reward_n)
    reward_n = np.concatenate([reward_n, np.full(len(unseen), reward_n.max())])
    solve = _reverse if objective.direction == "reverse" else _forward
    if objective.method == "answers":
        reward_n, weight_n = _augmented(class_n, reward_n, weight_n, answers, beta, objective.direction)
    return np.bincount(class_n, weights=solve(weight_n, reward_n, beta), minlength=answers + 1)[:answers]


def _augmented(class_n, reward_n, weight_n, answers: int, beta: float, direction: str):
    """Rewards and weights of MARA over answers, of which every good class ends with that of the largest."""
    good_n = class_n < answers
    score_n = np.log(weight_n) + (reward_n / beta if direction == "reverse" else 0.0)
    log_mass_a = np.full(answers, -np.inf)
    np.logaddexp.at(log_mass_a, class_n[good_n], score_n[good_n])
    lift_n = np.where(good_n, log_mass_a.max() - np.append(log_mass_a, 0.0)[class_n], 0.0)
    if direction == "reverse":
        return reward_n + beta * lift_n, weight_n
    anchor_n = class_n == np.argmax(log_mass_a)
    heaviest = {r: weight_n[anchor_n & (reward_n == r)].sum() for r in np.unique(reward_n[anchor_n])}
    return np.where(good_n, max(heaviest, key=lambda r: heaviest[r]), reward_n), weight_n * np.exp(lift_n)


def _reverse(weight_n, reward_n, beta: float):
    """Proportional to w exp(R / beta)."""
    score_n = np.log(weight_n) + reward_n / beta
    mass_n = np.exp(score_n - score_n.max())
    return mass_n / mass_n.sum()


def _forward(weight_n, reward_n, beta: float):
    """beta w / (Lambda - R), with the Lambda for which they sum to 1, found by bisection of its logarithm."""
    gap_n = reward_n.max() - reward_n
    # Bounds of the logarithm of Lambda less the best reward.
    low, high = np.log(beta * weight_n[gap_n == 0].sum()), np.log(beta * weight_n.sum())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(beta * weight_n / (np.exp(middle) + gap_n)) > 1 else (low, middle)
    mass_n = beta * weight_n / (np.exp((low + high) / 2) + gap_n)
    return mass_n / mass_n.sum()


def chance_of_missing(missed: int, optimum: float, sightings: int, share: float = SHARE) -> float:
    """Chance that an answer at `share` of its mass at the optimum is in none of `missed` completions in a row.

    The mass at the optimum is itself an estimate, in proportion to how often samples of the reference policy gave the
    answer. With c sightings there, and e = share x optimum x missed expected among the completions, the chance is
    (1 + e / c)^-c: of Poisson counts, the conditional test of two rates; exp(-e) where c is large.

    Args:
        missed: completions of the prompt since the answer was given.
        optimum: its estimated mass at the optimum.
        sightings: how often samples of the reference policy gave it, at least once.
        share: of that mass.

    Returns:
        A probability.

    Source:
        Przyborowski and Wilenski 1940, the conditional test of two Poisson means, for a count of 0.
    """
    expected = share * optimum * missed
    return float((1 + expected / sightings) ** -sightings)


def is_lost(missed: int, optimum: float, sightings: int) -> bool:
    """Whether an answer is below SHARE of its mass at the optimum, where one just there is called so by CHANCE."""
    return chance_of_missing(missed, optimum, sightings) <= CHANCE
