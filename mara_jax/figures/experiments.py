"""The didactic experiments of the papers: trainings on enumerated problems, and how far they end from exact optima."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mara_jax.core import advantages, augment, objectives, targets
from mara_jax.policies import categorical
from mara_jax.toy import training
from mara_jax.toy.problems import Problem

BETAS = (1.0, 0.5, 0.25, 0.2, 0.15, 0.132, 0.10, 0.05, 0.025, 0.01)


class Objective(NamedTuple):
    """What is maximised: `method`, the KL's `direction`, and whose reward augmentation MARA uses.

    `algorithm1` asks for Algorithm 1's reward where `direction` is "forward". It was derived for the reverse
    KL, so this is not MARA as published; the paper's first version most likely drew it.
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

    `gradients` "sampled" takes `batch` draws a step, no baseline, MARA's anchor from the batch, and the
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
    """The distribution that an objective is maximised by, in float64.

    Args:
        problem: reference, rewards and threshold.
        objective: method and direction.
        beta: regularisation strength, above 0.

    Returns:
        Log-probabilities (nats), [a].
    """
    with jax.enable_x64(True):
        ref_logp_a, reward_a = jnp.asarray(problem.ref_logp), jnp.asarray(problem.reward)
        if objective.method == "mara" and not objective.algorithm1:
            logp_a = targets.mara(ref_logp_a, reward_a, beta, problem.threshold, objective.direction)
            return np.asarray(logp_a)
        if objective.algorithm1:
            reward_a = _algorithm1_reward(ref_logp_a, reward_a, beta, problem.threshold)
        solve = targets.reverse_kl if objective.direction == "reverse" else targets.forward_kl
        return np.asarray(solve(ref_logp_a, reward_a, beta))


def _algorithm1_reward(ref_logp_a, reward_a, beta, threshold):
    """Rewards after Algorithm 1, anchored over the whole good set."""
    return augment.mara(reward_a[None], ref_logp_a[None], beta=beta, threshold=threshold, direction="reverse")[0][0]


def train(problem: Problem, objective: Objective, betas: tuple[float, ...], settings: Settings) -> np.ndarray:
    """Train a free categorical policy from uniform, once a beta.

    Args:
        problem: reference, rewards and threshold.
        objective: method and direction.
        betas: regularisation strengths.
        settings: the optimiser's settings.

    Returns:
        Final log-probabilities (nats), float64 [b, a].
    """
    if objective.algorithm1:
        logits_ba = _train_algorithm1(
            jnp.asarray(problem.ref_logp, jnp.float32),
            jnp.asarray(problem.reward, jnp.float32),
            jnp.asarray(betas, jnp.float32),
            problem.threshold,
            settings.seed,
            dataclasses.replace(settings, seed=0),  # static, so that seeds share one program
        )
        return _log_normalised(logits_ba)
    choices = training.Choices(
        method=objective.method,
        direction=objective.direction,
        gradients=settings.gradients,
        steps=settings.steps,
        batch=settings.batch,
        every=settings.steps,  # only the end is of interest here
    )
    ended = training.grid(
        jnp.asarray(problem.ref_logp),
        jnp.asarray(problem.reward),
        betas=jnp.asarray(betas),
        seeds=jnp.asarray([settings.seed]),
        threshold=problem.threshold,
        learning_rate=settings.learning_rate,
        choices=choices,
    )
    return _log_normalised(ended.logp_a[:, 0])


def _log_normalised(logits_ba) -> np.ndarray:
    logits_ba = np.asarray(logits_ba, np.float64)
    return logits_ba - np.logaddexp.reduce(logits_ba, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames="settings")
def _train_algorithm1(ref_logp_a, reward_a, beta_b, threshold, seed, settings: Settings):
    """Logits [b, a] after training under the forward KL with Algorithm 1's reward.

    `train.sweep` does not offer this pair, because it is not an objective anyone should choose.
    """
    tx = optax.adam(settings.learning_rate)

    def sampled_loss(logits_a, beta, key):
        logp_a = categorical.log_probs(logits_a)
        draw_key, ref_key = jax.random.split(key)
        drawn_g = categorical.sample(draw_key, jax.lax.stop_gradient(logp_a), settings.batch)
        read_g = categorical.sample(ref_key, ref_logp_a, settings.batch)
        reward_1g, _ = augment.mara(
            reward_a[drawn_g][None], ref_logp_a[drawn_g][None], beta=beta, threshold=threshold, direction="reverse"
        )
        ones_1g1 = jnp.ones((1, settings.batch, 1))
        return objectives.forward_kl_samples(
            logp_a[drawn_g][None, :, None],
            ones_1g1,
            reward_1g,
            logp_a[read_g][None, :, None],
            ones_1g1,
            ones_1g1[..., 0],
            beta=beta,
            advantage=advantages.none,
        )[0]

    def exact_loss(logits_a, beta, _):
        augmented_a = _algorithm1_reward(ref_logp_a, reward_a, beta, threshold)
        return -categorical.objective(logits_a, ref_logp_a, augmented_a, beta, "forward")

    loss = sampled_loss if settings.gradients == "sampled" else exact_loss

    def one(beta):
        def step(carry, index):
            logits_a, opt_state = carry
            gradient_a = jax.grad(loss)(logits_a, beta, jax.random.fold_in(jax.random.key(seed), index))
            updates_a, opt_state = tx.update(gradient_a, opt_state)
            return (logits_a + updates_a, opt_state), None

        start = jnp.zeros_like(ref_logp_a)
        return jax.lax.scan(step, (start, tx.init(start)), jnp.arange(settings.steps))[0][0]

    return jax.vmap(one)(beta_b)
