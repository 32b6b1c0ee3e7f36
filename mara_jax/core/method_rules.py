"""What follows from the tables of `core.methods`: what "auto" stands for, the loss, and what it optimises."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.core import bounded, methods, moving_threshold
from mara_jax.core.method_rows import Need, Objective, Outcomes, Transform
from mara_jax.core.objectives import LossAndMetrics, sequence_logp
from mara_jax.core.scored import Algorithm, Numbers, Scored

A = TypeVar("A", bound=Algorithm)
Row = TypeVar("Row")

# A gradient step of this size on the squared gap moves log Z half of the way to its group's estimate.
LOG_Z_STEP = 0.25
LEAST_VISITS = 10  # of a prompt in a run, for its log Z to be learned


def resolved(algorithm: A) -> A:
    """The same choices with no "auto" left; idempotent.

    Args:
        algorithm: as configured.

    Returns:
        With the preset's transform, objective and baseline where they are "auto" (an objective with a baseline of its
        own has that), the first estimator of the chosen KL, and the anchor that the transform has.

    Raises:
        ValueError: a name that is in none of the tables.
    """
    method = _row("method", methods.METHODS, algorithm.method)
    name = method.transform if isinstance(method.transform, str) else method.transform[algorithm.anchor]
    name = name if algorithm.transform == "auto" else algorithm.transform
    objective = method.objective if algorithm.objective == "auto" else algorithm.objective
    row, transform = _row("objective", methods.OBJECTIVES, objective), _row("transform", methods.TRANSFORMS, name)
    changed: dict[str, Any] = {"transform": name, "objective": objective}
    if algorithm.baseline == "auto":
        changed["baseline"] = row.baseline or method.baseline
    if algorithm.estimator == "auto" and row.placements:
        changed["estimator"] = row.placements[algorithm.kl][0]
    changed["anchor"] = transform.anchor or algorithm.anchor
    return dataclasses.replace(algorithm, **changed)  # pyright: ignore[reportArgumentType, reportReturnType]


def _row(field: str, table: Mapping[str, Row], name: str) -> Row:
    if name not in table:
        raise ValueError(f"algorithm.{field}={name!r} is no row of core/methods.py: choose one of {', '.join(table)}")
    return table[name]


def rows(algorithm: Algorithm) -> tuple[Transform, Objective]:
    """The rows of an algorithm's transform and objective.

    Args:
        algorithm: as configured, or resolved.

    Returns:
        Both rows.
    """
    algorithm = resolved(algorithm)
    return methods.TRANSFORMS[algorithm.transform], methods.OBJECTIVES[algorithm.objective]


def needs(algorithm: Algorithm) -> frozenset[Need]:
    """What a run must have for this algorithm.

    Args:
        algorithm: as configured, or resolved.

    Returns:
        Words of `methods.Need`; "groups" of at least 2 also where the baseline compares samples.
    """
    transform, objective = rows(algorithm)
    compares: tuple[Need, ...] = ("groups",) if resolved(algorithm).baseline != "none" else ()
    return frozenset((*transform.needs, *objective.needs, *compares))


def reads_reference_samples(algorithm: Algorithm) -> bool:
    """Whether the loss reads completions of the reference policy besides the policy's.

    Args:
        algorithm: as configured, or resolved.
    """
    return resolved(algorithm).estimator == "reference_samples"


def learns_log_z(algorithm: Algorithm) -> bool:
    """Whether the update learns a log Z for each prompt.

    Args:
        algorithm: as configured, or resolved.
    """
    return rows(algorithm)[1].learns_log_z


def moves_threshold(algorithm: Algorithm) -> bool:
    """Whether what is good depends on the rewards of earlier batches: a method with a threshold, set to a percentile.

    Args:
        algorithm: as configured, or resolved.
    """
    transform, objective = rows(algorithm)
    reads = objective.reads_threshold or transform.anchor is not None
    return algorithm.threshold_percentile > 0 and reads


def transformed(
    algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers
) -> tuple[Scored, Scored | None]:
    """Both batches with the rewards and reference log-probs of the transform.

    A MARA sees both groups of a prompt as one, so that reward and likelihood term share their anchor. Other transforms
    change rewards, which the likelihood term does not have.

    Args:
        algorithm: resolved; static.
        scored: completions of the policy.
        reference: completions of the reference policy, or None.
        numbers: traced.

    Returns:
        Both; the reference's with `ref_weight`, bounded as `core.bounded` says.
    """
    row = methods.TRANSFORMS[algorithm.transform]
    if reference is None or row.anchor is None:
        reward_pg, ref_logp_pg = row.apply(algorithm, scored, numbers)
        if reference is not None:
            reference = reference._replace(ref_weight=jnp.ones_like(reference.ref_logp))
        return scored._replace(reward=reward_pg, ref_logp=ref_logp_pg), reference
    both = {
        name: jnp.concatenate([getattr(scored, name), getattr(reference, name)], axis=1)
        for name in ("reward", "answer", "ref_logp")
    }
    reward_pn, ref_logp_pn = row.apply(algorithm, scored._replace(**both), numbers)
    g = scored.reward.shape[1]
    weight_pr = bounded.exp(ref_logp_pn[:, g:] - reference.ref_logp)
    return (
        scored._replace(reward=reward_pn[:, :g], ref_logp=ref_logp_pn[:, :g]),
        reference._replace(reward=reward_pn[:, g:], ref_logp=ref_logp_pn[:, g:], ref_weight=weight_pr),
    )


def loss(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers) -> LossAndMetrics:
    """The scalar to minimise, and its metrics, from log-probabilities and scores alone.

    Args:
        algorithm: static; its beta, threshold and eta are not read. What training refuses is computed, too, for audits.
        scored: completions of the policy itself, or of an older one.
        reference: completions of the reference policy; None unless `reads_reference_samples`.
        numbers: traced.

    Returns:
        The loss, and metrics: the objective's as objective/NAME, those of rewards, log-probs and importance weights.
    """
    algorithm = resolved(algorithm)
    after, reference = transformed(algorithm, scored, reference, numbers)
    value, metrics = methods.OBJECTIVES[algorithm.objective].loss(algorithm, after, reference, numbers)
    logp_pg = jax.lax.stop_gradient(sequence_logp(scored.logp, scored.mask))
    changed_pg = (after.reward != scored.reward) | (after.ref_logp != scored.ref_logp)
    of_weights = ("ratio/", "sampler_weight/")
    named = {name if name.startswith(of_weights) else f"objective/{name}": x for name, x in metrics.items()}
    return value, named | {
        "loss": value,
        "reward/mean": jnp.mean(scored.reward),
        "reward/augmented_mean": jnp.mean(after.reward),
        "mara/augmented_fraction": jnp.mean(changed_pg.astype(jnp.float32)),
        "kl/k1": jnp.mean(logp_pg - scored.ref_logp),
        "logp/mean": jnp.mean(logp_pg),
    }


def log_z_estimate(algorithm: Algorithm, scored: Scored, numbers: Numbers) -> jax.Array:
    """A group's own estimate of its prompt's log Z, which is exact where the policy is at the optimum.

    Args:
        algorithm: static.
        scored: completions of the policy.
        numbers: traced.

    Returns:
        [p], the mean of log ref + R / beta - log pi (nats); not differentiated.
    """
    after, _ = transformed(resolved(algorithm), scored, None, numbers)
    logp_pg = jnp.sum(jnp.where(scored.mask > 0, scored.logp, 0.0), axis=-1)
    return jax.lax.stop_gradient(jnp.mean(after.ref_logp + after.reward / numbers.beta - logp_pg, axis=-1))


def describe(algorithm: Algorithm) -> str:
    """What an algorithm really optimises, in one sentence without a full stop.

    Args:
        algorithm: as configured, or resolved; of a combination that training accepts.

    Returns:
        As "maximises E[R] - beta KL(pi || ref) of whole completions, exactly (k1 in reward)".
    """
    algorithm = resolved(algorithm)
    transform, objective = rows(algorithm)
    sentence = objective.optimises if isinstance(objective.optimises, str) else objective.optimises(algorithm)
    if algorithm.transform != "none":
        sentence += f"; with rewards {transform.rewards}{'' if objective.refuses_mara else transform.exactly}"
    if not moves_threshold(algorithm):
        return sentence
    best = 100 * float(moving_threshold.good_share(algorithm.threshold_percentile))
    return (
        f"{sentence}; good are the best {best:g} % of the rewards of the {algorithm.threshold_window} steps before, "
        f"from {algorithm.threshold:g} on, so that tau moves with the policy, and the objective with it"
    )


def optimum(algorithm: Algorithm, outcomes: Outcomes, numbers: Numbers, group: int) -> Any:
    """Where an algorithm ends, for a policy that can reach every distribution over the outcomes.

    Args:
        algorithm: as configured, or resolved.
        outcomes: all there are.
        numbers: beta, threshold, eta.
        group: samples in a group.

    Returns:
        Log-probabilities [a] (nats), or None where no closed form is known or no single distribution is optimal.
    """
    algorithm = resolved(algorithm)
    transform, objective = rows(algorithm)
    if algorithm.likelihood_penalty:
        return None
    if algorithm.transform == "none":
        return objective.optimum and objective.optimum(algorithm, outcomes, numbers, group)
    if objective.refuses_mara or transform.optimum is None:
        return None
    return transform.optimum(algorithm, outcomes, numbers, group)


def forecast_method(algorithm: Algorithm) -> Literal["vanilla", "answers", "strings"] | None:
    """The optimum that `core.forecast` computes from samples: "vanilla", "answers", "strings", or None.

    A threshold that moves with the policy leaves none.

    Args:
        algorithm: as configured, or resolved.
    """
    transform, objective = rows(algorithm)
    unknown = objective.refuses_mara or algorithm.likelihood_penalty or moves_threshold(algorithm)
    return None if unknown else transform.forecast


def check_rewards(algorithm: Algorithm, reward: Any) -> None:
    """Refuses negative rewards where a method multiplies or divides rewards; for the first batches of a run.

    Args:
        algorithm: as configured, or resolved.
        reward: of completions, any shape, on the host.

    Raises:
        ValueError: one line.
    """
    least = float(np.min(np.asarray(reward), initial=0.0))
    if least < 0 and "non_negative_rewards" in needs(algorithm):
        algorithm = resolved(algorithm)
        which = "transform" if "non_negative_rewards" in rows(algorithm)[0].needs else "objective"
        raise ValueError(
            f"a completion has the reward {least:g}, and algorithm.{which}={getattr(algorithm, which)} multiplies or "
            "divides rewards, so that they must not be negative: add a constant to the task's reward, or use "
            "algorithm.method=vanilla"
        )


def check_leaving_out(algorithm: Algorithm) -> None:
    """Refuses to leave completions out of an update whose mean gradient is then no longer that of a stated objective.

    Args:
        algorithm: as configured, or resolved.

    Raises:
        ValueError: one line.
    """
    row = resolved(algorithm)
    wanted = {
        "objective": "policy_gradient",
        "estimator": "k1_in_reward",
        "level": "sequence",
        "importance": "none",
        "baseline": "leave_one_out",
    }
    if "groups" in methods.TRANSFORMS[row.transform].needs:  # its rewards would depend on those that are left out
        wanted["transform"] = "none"
    for name, value in wanted.items():
        if getattr(row, name) != value:
            raise ValueError(
                f"truncated completions are left out (mask), which needs algorithm.{name}={value}, not "
                f"{getattr(row, name)}: with others the objective would have no name; use task.truncated=score or zero"
            )


def check_prompts(algorithm: Algorithm, prompts: int, visits: int) -> None:
    """Refuses a log Z for each prompt where a run sees most prompts too rarely to learn it.

    Args:
        algorithm: as configured, or resolved.
        prompts: how many prompts the task has.
        visits: how many the run draws in all: steps x prompts a step.

    Raises:
        ValueError: one line.
    """
    if learns_log_z(algorithm) and visits < LEAST_VISITS * prompts:
        raise ValueError(
            f"algorithm.objective={resolved(algorithm).objective} learns log Z for each of {prompts} prompts, and "
            f"{visits} visits in all are fewer than {LEAST_VISITS} a prompt: use algorithm.method=vargrad, which needs "
            "no log Z, or raise steps"
        )
