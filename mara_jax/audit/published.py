"""What can be audited by name: methods and objectives of `core.methods`, estimators, and what other frameworks ship.

Every objective has the form of `core.method_rules.loss`: (algorithm, scored, reference, numbers) -> (loss, metrics).
Those that are no row of the table are here, from their published formulas, on-policy and before any clipping acts: the
ratio of new to old policy is 1 and its gradient that of log pi; `rloo_updates` alone has ratios.
Rewards pass the configured transform first, so that MARA can be tried beside each.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mara_jax import config
from mara_jax.core import advantages, bounded, kl, method_rules, methods
from mara_jax.core.objectives import sequence_logp
from mara_jax.core.scored import Numbers, Scored

Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Setting(NamedTuple):
    """One thing to audit.

    `name` as asked for; `algorithm` its transform, objective, direction, estimator, level and baseline, no "auto" left;
    `objective` the code that turns a scored group into a loss; `form` what that code does, in one line.
    """

    name: str
    algorithm: config.Algorithm
    objective: Objective
    form: str


def _tokens(scored: Scored):
    """Log-probabilities of policy and reference [p, g, t], zero where masked, and the strings' lengths [p, g]."""
    assert scored.ref_token_logp is not None, "published formulas at token level need the reference's tokens"
    logp_pgt, ref_pgt = (jnp.where(scored.mask > 0, x, 0.0) for x in (scored.logp, scored.ref_token_logp))
    return logp_pgt, ref_pgt, jnp.sum(scored.mask, axis=-1)


def _transformed(algorithm: config.Algorithm, scored: Scored, numbers: Numbers):
    """Rewards and reference log-probabilities [p, g] as the configured transform returns them."""
    after, _ = method_rules.transformed(method_rules.resolved(algorithm), scored, None, numbers)
    return after.reward, after.ref_logp


def _loss(loss_pg):
    value = jnp.mean(loss_pg)
    return value, {"loss": value}


def _frozen(advantage_pg):
    return jax.lax.stop_gradient(advantage_pg)


def ppo(algorithm, scored, reference, numbers):
    """k1 of every token in its reward, summed from there to the end: PPO with gamma = lambda = 1 (arXiv 1909.08593)."""
    logp_pgt, ref_pgt, _ = _tokens(scored)
    reward_pg, _ = _transformed(algorithm, scored, numbers)
    k1_pgt = jax.lax.stop_gradient(logp_pgt - ref_pgt)
    to_go_pgt = jnp.flip(jnp.cumsum(jnp.flip(k1_pgt, -1), -1), -1)
    return _loss(-jnp.sum(_frozen(reward_pg[..., None] - numbers.beta * to_go_pgt) * logp_pgt, axis=-1))


def k3_sum_in_reward(algorithm, scored, reference, numbers):
    """The tokens' k3 summed and taken off the string's reward, leave-one-out over both."""
    logp_pgt, ref_pgt, _ = _tokens(scored)
    reward_pg, _ = _transformed(algorithm, scored, numbers)
    return_pg = reward_pg - numbers.beta * jnp.sum(kl.k3(logp_pgt, ref_pgt), axis=-1)
    return _loss(-_frozen(advantages.leave_one_out(return_pg)) * jnp.sum(logp_pgt, axis=-1))


def length_normalised(algorithm, scored, reference, numbers):
    """k1 of the whole string in the reward and leave-one-out, as shipped here, but each string's term over |o|."""
    reward_pg, ref_logp_pg = _transformed(algorithm, scored, numbers)
    logp_pg = sequence_logp(scored.logp, scored.mask)
    return_pg = reward_pg - numbers.beta * kl.k1(jax.lax.stop_gradient(logp_pg), ref_logp_pg)
    return _loss(-_frozen(advantages.leave_one_out(return_pg)) * logp_pg / jnp.sum(scored.mask, axis=-1))


def rloo_updates(algorithm, scored, reference, numbers):
    """Leave-one-out over reward and the sampler's own k1, times pi/pi_sampler (TRL's RLOOTrainer, num_iterations)."""
    reward_pg, ref_logp_pg = _transformed(algorithm, scored, numbers)
    logp_pg, old_pg = (sequence_logp(x, scored.mask) for x in (scored.logp, scored.old_logp))
    advantage_pg = _frozen(advantages.leave_one_out(reward_pg - numbers.beta * kl.k1(old_pg, ref_logp_pg)))
    ratio_pg = bounded.exp(logp_pg - _frozen(old_pg))
    if not algorithm.clip:
        return _loss(-ratio_pg * advantage_pg)
    clipped_pg = jnp.clip(ratio_pg, 1 - algorithm.clip, 1 + algorithm.clip)
    return _loss(-jnp.minimum(ratio_pg * advantage_pg, clipped_pg * advantage_pg))


# name -> (level of the KL, baseline, formula); level and baseline as this package would call them.
_FORMULAS: dict[str, tuple[str, str, Objective]] = {
    "ppo": ("sequence", "none", ppo),
    "k3_sum_in_reward": ("token", "leave_one_out", k3_sum_in_reward),
    "length_normalised": ("sequence", "leave_one_out", length_normalised),
    "rloo_updates": ("sequence", "leave_one_out", rloo_updates),
}

# Estimators at the level at which frameworks commonly have them, in this package's own objective.
_LEVELS = {
    "k1_in_loss": "token",
    "k2_in_loss": "token",
    "k3_in_loss": "token",
    "k1_in_reward": "sequence",
    "k3_in_reward": "sequence",
}

# This package's own objective, with one choice changed.
_CHANGED: dict[str, tuple[dict[str, str], str]] = {
    "rloo": (
        {"estimator": "k1_in_reward", "level": "sequence", "baseline": "leave_one_out"},
        "k1 of the whole string in the reward, leave-one-out over both (arXiv 2402.14740)",
    ),
    "group_std": (
        {"estimator": "k1_in_reward", "level": "sequence", "baseline": "group_normalised"},
        "k1 of the whole string in the reward, both over their group's standard deviation",
    ),
}

NAMES = tuple(dict.fromkeys((*_LEVELS, *_CHANGED, *methods.METHODS, *methods.OBJECTIVES, *_FORMULAS)))


def configured(name: str, algorithm: config.Algorithm) -> Setting:
    """The setting that a configuration selects: the training step's own objective.

    Args:
        name: what to call it.
        algorithm: of the configuration; what is "auto" is resolved.

    Returns:
        The setting.
    """
    algorithm = method_rules.resolved(algorithm)
    return Setting(name, algorithm, method_rules.loss, _form(algorithm))


def _form(algorithm: config.Algorithm) -> str:
    """Estimator and baseline, or the KL of an objective that has its own, and what is done to rewards first."""
    transform, row = method_rules.rows(algorithm)
    if row.placements:
        level = "" if algorithm.estimator in ("reference_samples", "ratio") else f" at {algorithm.level} level"
        form = f"{algorithm.estimator}{level}, baseline {algorithm.baseline}"
    else:
        form = f"KL: {row.kl}; baseline {algorithm.baseline}" + f" ({row.paper})" * bool(row.paper)
    return form if algorithm.transform == "none" or transform.anchor else f"{form}; rewards {transform.rewards}"


def setting(name: str, base: config.Algorithm, level: str | None = None) -> Setting:
    """A setting by its name.

    Args:
        name: one of NAMES.
        base: gives anchor, direction, beta, threshold and eta; the transform, where the name is not that of a method
            with one; for the estimators, the baseline.
        level: "sequence" or "token" log-ratios, for the estimators alone; by default what is common.

    Returns:
        The setting.

    Raises:
        ValueError: an unknown name, a level where the formula fixes it, or a beta of 0 that the objective divides by.
    """
    if name not in NAMES:
        raise ValueError(f"--as={name} is not known: choose one of {', '.join(NAMES)}")
    if level not in (None, "sequence", "token"):
        raise ValueError(f"--level={level} is not known: choose sequence or token")
    base = method_rules.resolved(base)
    if name in _LEVELS:
        changed = {"objective": "policy_gradient", "estimator": name, "level": level or _LEVELS[name]}
        return configured(name, dataclasses.replace(base, **changed))
    if level is not None:
        raise ValueError(f"--level={level} has no meaning for --as={name}, whose formula fixes it: leave it out")
    if name in _CHANGED:
        fields, form = _CHANGED[name]
        algorithm = dataclasses.replace(base, objective="policy_gradient", **fields)
        return Setting(name, algorithm, method_rules.loss, form)
    # Every other formula is a rollout's only update, drawn by the policy itself.
    ratio = ("sequence", base.clip) if name == "rloo_updates" else ("none", 0.0)
    unweighted = dataclasses.replace(base, importance=ratio[0], clip=ratio[1], truncate=0.0, truncate_level="sequence")
    if name in _FORMULAS:
        fixed, baseline, formula = _FORMULAS[name]
        algorithm = dataclasses.replace(unweighted, estimator=name, level=fixed, baseline=baseline)
        return Setting(name, algorithm, formula, (formula.__doc__ or "").strip().rstrip("."))
    preset = {"method": name, "transform": "auto", "objective": "auto"}
    by_objective = {"objective": name}
    fields = by_objective if name in methods.OBJECTIVES else preset
    algorithm = dataclasses.replace(unweighted, estimator="auto", level="sequence", baseline="auto", **fields)
    if "positive_beta" in method_rules.needs(algorithm) and base.beta == 0:
        raise ValueError(f"algorithm.beta=0.0 with --as={name}, which divides by beta: use a positive beta (0.1)")
    return configured(name, algorithm)
