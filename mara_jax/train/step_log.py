"""The row of metrics.jsonl of each step, fetched while the device already samples for the next one."""

import collections
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax.core import diversity
from mara_jax.parallel import hosts
from mara_jax.sampling import Rollout
from mara_jax.train import metrics
from mara_jax.train.startup import Setup


class Step(NamedTuple):
    """A step whose update is dispatched: what its row is made of.

    number: from 1; reward, answer [p, g] of the policy's completions; metrics: scalars of the update, on the device;
    started, sampled, scored: clock (s) when the step began, had its completions, and had their scores.
    """

    number: int
    rollout: Rollout
    reward: jax.Array
    answer: jax.Array
    metrics: dict[str, jax.Array]
    started: float
    sampled: float
    scored: float


class StepLog:
    """Writes and shows the steps of a run."""

    def __init__(self, setup: Setup, file: metrics.Log, display: metrics.Display) -> None:
        self.setup, self.file, self.display = setup, file, display
        self.counts = collections.deque((_counts(row) for row in file.rows), maxlen=diversity.WINDOW)

    def write(self, step: Step) -> float:
        """Waits for a step's update, then writes and shows its row; returns the clock when the update ended."""
        row, completions, ended = fetch(self.setup, step)
        self.counts.append(_counts(row))
        pooled = np.sum(self.counts, axis=0)
        row["answers/entropy_bits"] = diversity.entropy_bits(pooled[:-1])
        if self.setup.log_optimum:
            gaps = diversity.gap(pooled, self.setup.log_optimum)
            row |= {f"gap/{name}": value for name, value in gaps.items()}
        self.file.write(row)
        self.display.step(row, completions[: self.setup.cfg.show_samples])
        return ended


def fetch(setup: Setup, step: Step) -> tuple[dict[str, Any], list[tuple[str, bool]], float]:
    """Waits for a step's update: its row, its completions with their success, and the clock when the update ended."""
    row: dict[str, Any] = {"step": step.number} | {name: float(value) for name, value in step.metrics.items()}
    ended = time.perf_counter()
    answer, lengths, reward = (hosts.gather(array) for array in (step.answer, step.rollout.lengths, step.reward))
    row |= {
        "valid/fraction": float(np.mean(answer >= 0)),
        "answers/counts": [int(np.sum(answer == a)) for a in range(len(setup.task.answers))],
        "samples": int(answer.size),
        "tokens/generated": int(np.sum(lengths)),
        "sampler/logp_gap": _logp_gap(step.rollout, row["logp/mean"]),
        "time/rollout_s": step.sampled - step.started,
        "time/reward_s": step.scored - step.sampled,
        "time/update_s": ended - step.scored,
        "time/step_s": ended - step.started,
    }
    good = (reward >= setup.cfg.algorithm.threshold).ravel().tolist()
    texts = [text for group in step.rollout.text for text in group]
    return row, list(zip(texts, good, strict=True)), ended


def _logp_gap(rollout: Rollout, trained: float) -> float:
    """Mean difference of the sampler's and the trainer's sequence log-probs: 0 but for rounding."""
    return float(np.mean(np.sum(hosts.gather(rollout.logp), axis=-1))) - trained


def _counts(row: dict[str, Any]) -> list[int]:
    """Completions of a step that gave each answer, then those that gave none."""
    return [*row["answers/counts"], row["samples"] - sum(row["answers/counts"])]
