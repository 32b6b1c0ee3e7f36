"""Stored batches under another objective: the reward transform and the advantages, by the functions of training."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import config
from mara_jax.core import method_rules
from mara_jax.core.scored import Numbers, Scored
from mara_jax.predict.prediction import Settings
from mara_jax.predict.stored_rollouts import Stored
from mara_jax.train import step
from mara_jax.train.scoring import AnswerIndices

METHODS = {"vanilla": ("vanilla", ""), "answers": ("mara", "answer"), "strings": ("mara", "string")}
_EQUAL = 1e-6  # relative difference of a group's rewards that is rounding


class Signal(NamedTuple):
    """What training would have made of k groups of g completions, [k, g] each.

    reward: as the transform returns it; changed: whether it, or the reference's log-probability, is another;
    advantage: the factor of each completion's grad log pi in the update, times the number of completions.
    """

    reward: np.ndarray
    changed: np.ndarray
    advantage: np.ndarray


def signal(stored: Stored, settings: Settings) -> Signal | None:
    """The signal of stored batches under other settings.

    The advantage is read off the loss itself, as its derivative by the completion's log-probability: for the reverse KL
    it is the reward, less beta times the log-ratio, less its baseline; for the forward KL it holds the KL's own term,
    estimated from the policy's completions (the estimator "ratio"), as the reference's completions of a step are not
    stored. Importance ratios are 1, as at a rollout's first update.

    Args:
      stored: the batches, and the samples of the reference policy that MARA over answers has its masses from.
      settings: method, KL, beta, threshold.

    Returns:
      None for MARA over answers where samples of the reference policy are missing under some prompt.

    Raises:
      ValueError: a run that leaves out truncated completions, and an objective that cannot.
    """
    algorithm = algorithm_of(stored.run.algorithm, settings)
    if stored.leaves_out_truncated:
        method_rules.check_leaving_out(algorithm)
    numbers = Numbers(settings.beta, settings.threshold, stored.run.algorithm.eta)
    scored = _scored(stored, algorithm, numbers)
    if scored is None:
        return None
    return Signal(*(np.asarray(array) for array in _signal(_static(algorithm), scored, numbers)))


def _static(algorithm: config.Algorithm) -> config.Algorithm:
    """The same without numbers, which are traced, so that all values share a program."""
    return dataclasses.replace(algorithm, beta=1.0, threshold=0.0, eta=0.0)


def algorithm_of(own: config.Algorithm, settings: Settings) -> config.Algorithm:
    """The algorithm of a run with another objective; its baseline is kept, and its estimator where the KL is the same.

    Args:
      own: the run's.
      settings: method, KL, beta, threshold.

    Returns:
      Without "auto".
    """
    resolved = method_rules.resolved(own)
    method, anchor = METHODS[settings.objective]
    same = resolved.objective == "policy_gradient" and resolved.kl == settings.kl
    estimator = resolved.estimator if same and resolved.level == "sequence" else "auto"
    if settings.kl == "forward" and estimator in ("auto", "reference_samples"):
        estimator = "ratio"
    return method_rules.resolved(
        config.Algorithm(
            method=method,
            anchor=anchor or "answer",  # pyright: ignore[reportArgumentType]
            kl=settings.kl,
            beta=settings.beta,
            threshold=settings.threshold,
            eta=own.eta,
            estimator=estimator,
            baseline=resolved.baseline if resolved.objective == "policy_gradient" else "auto",
        )
    )


def _scored(stored: Stored, algorithm: config.Algorithm, numbers: Numbers) -> Scored | None:
    """The batches as an objective sees them; a completion is one token here, whose log-prob is that of the whole."""
    answers, masses = AnswerIndices(len(stored.prompt_id)), step.Masses(None, None)
    if "masses" in method_rules.needs(algorithm):
        if not set(stored.text) <= set(stored.reference):
            return None
        own = [stored.reference[int(prompt)] for prompt in stored.prompt_id]
        reward_kn, answer_kn = np.stack([one.reward for one in own]), answers.of([one.answer for one in own])
        masses = _masses(
            jnp.asarray(reward_kn, float), jnp.asarray(answer_kn), stored.reward.shape[1], numbers, _static(algorithm)
        )
    logp_kg1 = jnp.asarray(stored.logp, float)[..., None]
    scored = Scored(
        logp_kg1,
        jnp.ones_like(logp_kg1),
        jnp.asarray(stored.ref_logp, float),
        jnp.asarray(stored.reward, float),
        jnp.asarray(answers.of(stored.answer)),
        masses.log_mass,
        unseen_log_mass=masses.unseen,
    )
    return scored._replace(counted=jnp.asarray(stored.finished, float)) if stored.leaves_out_truncated else scored


_masses = jax.jit(step.answer_masses, static_argnames=("group_size", "algorithm"))


@functools.partial(jax.jit, static_argnames="algorithm")
def _signal(algorithm: config.Algorithm, scored: Scored, numbers: Numbers):
    after, _ = method_rules.transformed(algorithm, scored, None, numbers)
    changed_kg = (after.reward != scored.reward) | (after.ref_logp != scored.ref_logp)

    def loss(logp_kg1):
        return method_rules.loss(algorithm, scored._replace(logp=logp_kg1), None, numbers)[0]

    gradient_kg = jax.grad(loss)(scored.logp)[..., 0]
    return after.reward, changed_kg, -gradient_kg * scored.reward.size


def summary(signal: Signal, own: Signal) -> dict[str, float]:
    """A setting's signal in numbers, beside that of the run's own settings.

    Args:
      signal: of the setting.
      own: of the run.

    Returns:
      `augmented`, share of the completions that the transform changes; `reward`, the mean of what it returns;
      `advantage`, the mean absolute advantage (reward units); `equal_groups`, share of the groups whose transformed
      rewards are all equal, so that nothing but the KL moves the policy; `correlation` of the advantages with the run's
      own, nan where either is constant.
    """
    largest_k = np.maximum(np.abs(signal.reward).max(axis=1), 1.0)
    ours, theirs = signal.advantage.ravel().astype(np.float64), own.advantage.ravel().astype(np.float64)
    varies = np.std(ours) > 0 and np.std(theirs) > 0
    return {
        "augmented": float(np.mean(signal.changed)),
        "reward": float(np.mean(signal.reward, dtype=np.float64)),
        "advantage": float(np.mean(np.abs(ours))),
        "equal_groups": float(np.mean(np.ptp(signal.reward, axis=1) <= _EQUAL * largest_k)),
        "correlation": float(np.corrcoef(ours, theirs)[0, 1]) if varies else float("nan"),
    }
