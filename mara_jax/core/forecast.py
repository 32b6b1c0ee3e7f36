"""Where an objective ends, estimated from samples of the reference policy: shares of answers, and mode collapse.

The empirical distribution of n samples, each of mass 1/n, replaces the reference policy. The optimum of the objective
on them (core.targets) is the forecast, and the bootstrap (resampling them) gives its confidence intervals.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from mara_jax.core import forecast_curves, pooled_samples, targets
from mara_jax.core.targets import Direction

Method = Literal["vanilla", "answers", "strings"]
LEAST_BETA = 1e-6  # used for beta = 0, whose optimum is the limit: the best answers, in the reference's ratio
RESAMPLES = 1000  # of the samples, for the interval of a forecast collapse


class Objective(NamedTuple):
    """E[R] - beta KL: `method` is "vanilla", or MARA over "answers" or "strings"; `direction` of the KL;
    `beta` at least 0 (reward units per nat); `threshold`, the reward from which a completion is good."""

    method: Method
    direction: Direction
    beta: float
    threshold: float


class Samples(NamedTuple):
    """n samples of the reference policy under one prompt, or (`exact`) every outcome there is.

    `reward` of each; `answer` its class, negative for none; `ref_logp` the reference policy's log-probability of the
    whole completion (nats), or None where it is not known, which "strings" and `exact` need.
    """

    reward: Float[np.ndarray, " n"]
    answer: Int[np.ndarray, " n"]
    ref_logp: Float[np.ndarray, " n"] | None = None
    exact: bool = False


class Task(NamedTuple):
    """What a forecast needs of a task: the names of its answers, and whether (`equal_strings`) every answer has as many
    good strings as any other, so that MARA over strings makes all answers equally likely."""

    answers: tuple[str, ...]
    equal_strings: bool = False


def class_mass(
    objective: Objective,
    samples: Samples,
    answers: int,
    beta_b: Float[np.ndarray, " b"],
    *,
    key: PRNGKeyArray,
    resamples: int,
) -> Float[np.ndarray, "b r c"]:
    """Probability of each answer, then of none, at the objective's optimum.

    Args:
        objective: its own beta is not read.
        samples: of the reference policy.
        answers: number of answers.
        beta_b: betas instead of the objective's, above 0.
        key: of the resamples.
        resamples: how many; 0 for exact outcomes.

    Returns:
        For each beta: row 0 from the samples, then the resamples, then a row for each answer that no
        sample gave, with the most that Wilson's 95 % interval allows it.
    """
    reward_n, lift_n, ref_logp_n = samples.reward, None, samples.ref_logp
    if objective.method == "strings":
        assert ref_logp_n is not None, "MARA over strings needs the reference's log-probabilities"
        lifted = pooled_samples.string_lift(jnp.asarray(reward_n, float), jnp.asarray(ref_logp_n), objective.threshold)
        reward_n, lift_n = map(np.asarray, lifted)
    groups = pooled_samples.pool(reward_n, samples.answer, answers)
    log_weight_n = np.full(len(reward_n), -np.log(len(reward_n)))
    if samples.exact:
        assert ref_logp_n is not None, "enumerated outcomes need the reference's log-probabilities"
        log_weight_n = ref_logp_n
    weight_rj = pooled_samples.log_weights(log_weight_n, groups, key, resamples, lift_n)
    likeliest_j = np.asarray(weight_rj[0])  # used where log ref is not known
    if ref_logp_n is not None:
        likeliest_j = np.full(len(groups.reward), -np.inf)
        np.maximum.at(likeliest_j, groups.index, ref_logp_n)
    mass_brc = pooled_samples.optimum_mass(
        weight_rj,
        pooled_samples.Outcomes(
            jnp.asarray(groups.reward, float), jnp.asarray(groups.answer), jnp.asarray(likeliest_j), len(reward_n)
        ),
        jnp.asarray(beta_b, float),
        objective.threshold,
        answers=answers,
        method="answers" if objective.method == "answers" else "vanilla",
        direction=objective.direction,
    )
    return np.asarray(mass_brc)


def class_log_mass(objective: Objective, samples_p: Sequence[Samples], task: Task) -> Float[np.ndarray, " c"] | None:
    """Log-probability of each answer, then of none, at the optimum, averaged over prompts; finite for every class.

    As `optima`, but with the digits that a probability of e^-1000 loses. MARA over strings is known where the task
    states that its answers have equally many: "none" then has at most its vanilla mass, which is returned.

    Args:
        objective: whose optimum.
        samples_p: samples under each prompt.
        task: that the samples answer.

    Returns:
        [c] nats, or None where samples cannot determine it. A class without a sample counts as half a sample: an answer
        with the best reward, "none" with the worst.
    """
    if objective.method == "strings" and not task.equal_strings:
        return None
    answers = len(task.answers)
    settings = {
        "answers": answers,
        "method": "answers" if objective.method == "answers" else "vanilla",
        "direction": objective.direction,
    }
    log_mass_pc = []
    for reward_n, answer_n, _, _ in samples_p:
        groups = pooled_samples.pool(reward_n, answer_n, answers)
        reward_j, answer_j = groups.reward, groups.answer
        count_j = np.bincount(groups.index, minlength=len(reward_j)).astype(float)
        count_j[list(groups.unseen)] = 0.5
        if not np.any(answer_n < 0):
            reward_j, answer_j = np.append(reward_j, reward_n.min()), np.append(answer_j, -1)
            count_j = np.append(count_j, 0.5)
        log_weight_j = jnp.log(count_j / len(reward_n))
        outcomes = pooled_samples.Outcomes(
            jnp.asarray(reward_j, float), jnp.asarray(answer_j), log_weight_j, len(reward_n)
        )
        beta = max(objective.beta, LEAST_BETA)
        log_mass_pc.append(
            pooled_samples.objective_log_mass(log_weight_j, outcomes, beta, objective.threshold, **settings)
        )
    log_mass_c = np.asarray(jax.nn.logsumexp(jnp.stack(log_mass_pc), axis=0) - np.log(len(log_mass_pc)), np.float64)
    if objective.method == "strings":
        none = log_mass_c[-1]
        return np.append(np.full(answers, np.log(-np.expm1(min(none, -1e-12)) / answers)), none)
    return log_mass_c


def optima(objective: Objective, samples_p: Sequence[Samples], task: Task) -> dict[str, list[float]]:
    """The share of each answer, then of none, at the optimum of vanilla RL ("vanilla") and of the objective's MARA.

    Each sample is an outcome of equal mass, so graded rewards are kept; the optimum of the papers' Eq. 3, 6 and 13 on
    them is exact for these samples. The optimum of MARA over strings is spread over all good strings, of which samples
    show a vanishing part; it is included where the task states that its answers have equally many.

    Args:
        objective: whose optimum.
        samples_p: samples under each prompt, equally many.
        task: that the samples answer.

    Returns:
        "vanilla" -> shares that sum to 1, and for MARA "mara" -> the same.
    """
    answers, beta = len(task.answers), max(objective.beta, LEAST_BETA)
    reward_pn = jnp.asarray(np.stack([samples.reward for samples in samples_p]))
    answer_pn = np.stack([samples.answer for samples in samples_p])
    ref_logp_pn = jnp.full(reward_pn.shape, -np.log(reward_pn.shape[1]))
    vanilla = targets.reverse_kl if objective.direction == "reverse" else targets.forward_kl
    shares = {"vanilla": _answer_shares(vanilla(ref_logp_pn, reward_pn, beta), answer_pn, answers)}
    if objective.method == "answers":
        mara = functools.partial(
            targets.mara_answers, beta=beta, threshold=objective.threshold, direction=objective.direction
        )
        logp_pn = jax.vmap(mara)(ref_logp_pn, reward_pn, jnp.asarray(answer_pn))
        shares["mara"] = _answer_shares(logp_pn, answer_pn, answers)
    elif objective.method == "strings" and task.equal_strings:
        shares["mara"] = [1 / answers] * answers + [0.0]
    return shares


def _answer_shares(logp_pn, answer_pn: np.ndarray, answers: int) -> list[float]:
    mass_pn = np.exp(np.asarray(logp_pn, np.float64))
    shares = [float(np.mean(np.sum(mass_pn * (answer_pn == a), axis=1))) for a in range(answers)]
    return [*shares, max(0.0, 1.0 - sum(shares))]


def collapse_at_optimum(
    objective: Objective, samples_p: Sequence[Samples], task: Task, *, key: PRNGKeyArray, resamples: int = RESAMPLES
) -> dict[str, Any] | None:
    """Describes the mode collapse of an objective whose own optimum is one; None for any other objective.

    The rule: under some prompt at least two answers may be good (they have a good sample, or none at all), and the
    optimum on the samples gives one of them COLLAPSED (95 %) of the mass of all completions with an answer.

    Args:
        objective: whose optimum.
        samples_p: samples under each prompt.
        task: that the samples answer.
        key: of the resamples.
        resamples: how many; 0 for exact outcomes.

    Returns:
        The worst prompt's `answer`, its `share` with the bootstrap interval `low` and `high`, `raise_above`: the beta
        above which the share is less (None where no beta helps), `seen`: how many answers the reference gave,
        `prompts` and `collapsing`: counts, and `method`, "vanilla" or "mara".
    """
    answers = len(task.answers)
    if answers < 2 or (objective.method == "strings" and task.equal_strings):
        return None
    beta, leaders = max(objective.beta, LEAST_BETA), []
    for samples in samples_p:
        given = np.unique(samples.answer[samples.answer >= 0])
        good = np.unique(samples.answer[(samples.answer >= 0) & (samples.reward >= objective.threshold)])
        seen = len(given)
        if not seen or answers - (seen - len(good)) < 2:
            continue  # one right answer alone is what training is for
        beta_b = forecast_curves.beta_grid(samples.reward, beta)
        mass_brc = class_mass(objective, samples, answers, beta_b, key=key, resamples=resamples)
        leader = forecast_curves.leader(forecast_curves.summarise(mass_brc, resamples), beta_b, beta)
        leaders.append(leader._asdict() | {"answer": task.answers[leader.index], "seen": seen})
    collapsing = [leader for leader in leaders if leader["share"] >= forecast_curves.COLLAPSED]
    if not collapsing:
        return None
    worst = max(collapsing, key=lambda leader: leader["share"])
    method = "vanilla" if objective.method == "vanilla" else "mara"
    return worst | {"method": method, "prompts": len(leaders), "collapsing": len(collapsing)}


def describe(objective: Objective) -> str:
    """A sentence that states the objective and its optimum."""
    beta, reverse = objective.beta, objective.direction == "reverse"
    if beta == 0:
        return "maximise E[R] without a KL: every policy on best-rewarded completions is an optimum"
    text = f"maximise E[R] - {beta:g} {'KL(pi || ref)' if reverse else 'KL(ref || pi)'} over whole completions"
    if objective.method == "vanilla":
        optimum = f"ref(y) exp(R(y) / {beta:g})" if reverse else f"{beta:g} ref(y) / (Lambda - R(y))"
        return f"{text}; its optimum is proportional to {optimum}: equal rewards keep the reference's own ratio"
    good = f"R >= {objective.threshold:g}"
    if objective.method == "strings":
        return (
            f"{text}, R augmented by MARA over strings: at its optimum every completion with {good} is equally likely"
        )
    return (
        f"{text}, R augmented by MARA over answers: at its optimum every answer reached with {good} is equally "
        "likely, and completions of one answer keep the reference's ratio"
    )
