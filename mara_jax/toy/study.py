"""Many toy trainings as one XLA program: chunk by chunk, sharded over the devices, results as plain arrays.

The axes are variants (method, KL, estimators), problems, betas, thresholds and seeds. All variants train inside the
same program, each as a batch of runs; a chunk holds the same number of runs of every variant, so memory does not grow
with the study. A run's numbers depend on its own settings alone: not on the chunk, the devices or its neighbours.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mara_jax.core import diversity, method_rules
from mara_jax.toy import problems, training

CHUNK = 1024  # runs of each variant at once; on a CPU, larger chunks exceed the cache


@dataclass(frozen=True)
class Plan:
    """The runs of a study: the product of its axes, at one step size.

    Attributes:
      variants: the static choices, one entry for each method, KL and estimator.
      problems: with equally many outcomes; their thresholds are not used.
      betas, thresholds, seeds: one or more of each.
      learning_rate: Adam's step size.
      chunk: runs of each variant trained at once, at most; rounded up to a multiple of the devices.
    """

    variants: tuple[training.Choices, ...]
    problems: tuple[problems.Problem, ...]
    betas: tuple[float, ...]
    thresholds: tuple[float, ...]
    seeds: tuple[int, ...]
    learning_rate: float
    chunk: int = CHUNK

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of every axis: variants, problems, betas, thresholds, seeds."""
        return tuple(len(axis) for axis in (self.variants, self.problems, self.betas, self.thresholds, self.seeds))

    @property
    def runs(self) -> int:
        return int(np.prod(self.shape))


def run(plan: Plan, progress: Callable[[int, int], Any] = lambda done, total: None) -> dict[str, np.ndarray]:
    """Trains every run of a plan.

    Args:
      plan: the axes.
      progress: called after each chunk with the runs done and their total.

    Returns:
      One array for each field of `training.Run`, and "coverage", whose leading axes are variants, problems, betas,
      thresholds and seeds; float32.

    Raises:
      ValueError: an empty axis, an unknown choice, or problems of different sizes.
    """
    _check(plan)
    devices = jax.devices()
    runs_per_variant = plan.runs // len(plan.variants)
    size = min(plan.chunk, runs_per_variant)
    size += -size % len(devices)
    sharding = NamedSharding(Mesh(np.array(devices), ("runs",)), PartitionSpec("runs"))
    problem_r, beta_r, threshold_r, seed_r = _columns(plan)
    ref_na, reward_na = (np.stack([getattr(p, name) for p in plan.problems]) for name in ("ref_logp", "reward"))
    target_vra, parts = [_optima(plan, choices) for choices in plan.variants], []
    for first in range(0, runs_per_variant, size):
        # The last chunk is padded with copies of its last run, so that one compiled program serves all chunks.
        index_r = np.minimum(np.arange(first, first + size), runs_per_variant - 1)
        rate_r = np.full(size, plan.learning_rate, np.float32)
        swept = training.Swept(*map(jnp.asarray, (beta_r[index_r], threshold_r[index_r], rate_r, seed_r[index_r])))
        rows = problem_r[index_r]
        targets = [None if table is None else table[index_r] for table in target_vra]
        arrays = (ref_na[rows].astype(np.float32), reward_na[rows].astype(np.float32), swept, targets)
        trained = _train(*jax.device_put(arrays, sharding), variants=plan.variants)
        count = min(size, runs_per_variant - first)
        parts.append([[np.asarray(array)[:count] for array in variant] for variant in trained])
        progress(len(plan.variants) * (first + count), plan.runs)
    result = {}
    for i, name in enumerate(training.Run._fields):
        stacked = np.stack(
            [np.concatenate([part[variant][i] for part in parts]) for variant in range(len(plan.variants))]
        )
        result[name] = stacked.reshape(*plan.shape, *stacked.shape[2:])
    good = reward_na[:, None, None, None, :] >= np.asarray(plan.thresholds)[None, None, :, None, None]
    return result | {"coverage": diversity.coverage(result["logp_a"], good)}


@partial(jax.jit, static_argnames="variants")
def _train(ref_logp_ra, reward_ra, swept_r, target_vra, *, variants):
    trained = []
    for choices, target_ra in zip(variants, target_vra, strict=True):
        train = partial(training.train, choices=choices)
        trained.append(
            jax.vmap(lambda ref, reward, swept, target, train=train: train(ref, reward, swept, target_logp_a=target))(
                ref_logp_ra, reward_ra, swept_r, target_ra
            )
        )
    return trained


def _optima(plan: Plan, choices: training.Choices) -> np.ndarray | None:
    """Each run's optimum, [r, a] (nats), where it is not computed as part of the program; else None."""
    if training.has_traced_optimum(choices):
        return None
    rows = itertools.product(plan.problems, plan.betas, plan.thresholds)
    optima = [
        training.known_optimum(problem.ref_logp, problem.reward, beta, threshold, choices)
        for problem, beta, threshold in rows
    ]
    return np.repeat(np.asarray(optima, np.float32), len(plan.seeds), axis=0)


def _columns(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Problem index, beta, threshold and seed of every run of a variant, the last axis fastest."""
    rows = itertools.product(range(len(plan.problems)), plan.betas, plan.thresholds, plan.seeds)
    problem_r, beta_r, threshold_r, seed_r = zip(*rows, strict=True)
    return (
        np.array(problem_r),
        np.array(beta_r, np.float32),
        np.array(threshold_r, np.float32),
        np.array(seed_r, np.int32),
    )


def _check(plan: Plan) -> None:
    for name, length in zip(("variants", "problems", "betas", "thresholds", "seeds"), plan.shape, strict=True):
        if not length:
            raise ValueError(f"the study has 0 {name}: give at least one")
    for choices in plan.variants:
        training.check(choices)
        for problem in plan.problems:
            method_rules.check_rewards(choices.algorithm, problem.reward)
    sizes = sorted({len(problem.reward) for problem in plan.problems})
    if len(sizes) > 1:
        raise ValueError(f"problems of {' and '.join(map(str, sizes))} outcomes: a study's problems have equally many")
    if plan.chunk < 1:
        raise ValueError(f"chunk {plan.chunk} is not a number of runs: use at least 1")
