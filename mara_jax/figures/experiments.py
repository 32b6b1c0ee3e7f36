"""The didactic experiments of the papers: trainings on enumerated problems, and how far they end from exact optima."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.core import targets
from mara_jax.toy import training
from mara_jax.toy.problems import Problem

BETAS = (1.0, 0.5, 0.25, 0.2, 0.15, 0.132, 0.10, 0.05, 0.025, 0.01)


class Objective(NamedTuple):
    """What is maximised: `method`, the KL's `direction`, and whose reward augmentation MARA uses.

    `algorithm1` asks for Algorithm 1's reward where `direction` is "forward". It was derived for the reverse
    KL, so this is not MARA as published; the paper's first version most likely plotted it.
    """

    label: str
    method: Literal["vanilla", "mara"]
    direction: targets.Direction
    algorithm1: bool = False


OBJECTIVES = {
    "reverse": Objective("reverse KL", "vanilla", "reverse"),
    "forward": Objective("forward KL", "vanilla", "forward"),
    "mara_reverse": Objective("MARA, reverse KL", "mara", "reverse"),
    "mara_forward": Objective("MARA, forward KL (Algorithm 2)", "mara", "forward"),
    "algorithm1_forward": Objective("forward KL with Algorithm 1's reward", "mara", "forward", algorithm1=True),
}


@dataclass(frozen=True)
class Settings:
    """How a policy is trained: Adam's step size, steps, and where gradients come from.

    `gradients` "sampled" takes `batch` samples a step, no baseline, MARA's anchor from the batch, and the
    forward KL from as many samples of the reference; "exact" sums over all outcomes.
    """

    gradients: Literal["sampled", "exact"]
    learning_rate: float
    steps: int
    batch: int = 32
    seed: int = 0


MODES = {
    "faithful": Settings("sampled", learning_rate=5e-3, steps=1000),  # the paper's Appendix C.1
    "converged": Settings("exact", learning_rate=5e-2, steps=4000),
}


def optimum(problem: Problem, objective: Objective, beta: float) -> np.ndarray:
    """The distribution that maximises an objective, in float64.

    Args:
        problem: reference, rewards and threshold.
        objective: method and direction.
        beta: regularisation strength, above 0.

    Returns:
        Log-probabilities (nats), [a].
    """
    with jax.enable_x64(True):
        ref_logp_a, reward_a = jnp.asarray(problem.ref_logp), jnp.asarray(problem.reward)
        return np.asarray(training.optimum(ref_logp_a, reward_a, beta, problem.threshold, _choices(objective)))


def _choices(objective: Objective, **settings) -> training.Choices:
    augmentation = "reverse" if objective.algorithm1 else None
    return training.Choices(objective.method, objective.direction, augmentation=augmentation, **settings)


def train(problem: Problem, objective: Objective, betas: tuple[float, ...], settings: Settings) -> np.ndarray:
    """Trains a free categorical policy from uniform, once a beta.

    Args:
        problem: reference, rewards and threshold.
        objective: method and direction.
        betas: regularisation strengths.
        settings: the optimiser's settings.

    Returns:
        Final log-probabilities (nats), float64 [b, a].
    """
    runs = training.grid(
        jnp.asarray(problem.ref_logp),
        jnp.asarray(problem.reward),
        betas=jnp.asarray(betas),
        seeds=jnp.asarray([settings.seed]),
        threshold=problem.threshold,
        learning_rate=settings.learning_rate,
        choices=_choices(
            objective,
            gradients=settings.gradients,
            steps=settings.steps,
            batch=settings.batch,
            every=settings.steps,  # only the final policy is used
        ),
    )
    logits_ba = np.asarray(runs.logp_a[:, 0], np.float64)
    return logits_ba - np.logaddexp.reduce(logits_ba, axis=-1, keepdims=True)
