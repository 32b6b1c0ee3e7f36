"""A policy measured on the prompts of a task: rewards, pass@k, and how many different answers it gives."""

import collections
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax.core import diversity
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Task, text_of
from mara_jax.train import group_metrics, scoring


class Sizes(NamedTuple):
    """How much is drawn: samples of each prompt, their length limit, prompts at once; and the reward from which on a
    completion is good."""

    samples: int
    max_new_tokens: int
    prompts_at_once: int
    threshold: float


def measure(
    task: Task, policy: Policy, params: Any, prompts: Sequence[list[int]], key: jax.Array, sizes: Sizes
) -> dict[str, Any]:
    """Samples and scores completions of every prompt of a task.

    Args:
      prompts: token ids of each.

    Returns:
      `metrics`, means over the prompts, and `prompts`, the same of each with its answers' counts.
    """
    rows: list[dict[str, Any]] = []
    for first in range(0, len(task), sizes.prompts_at_once):
        ids = np.arange(first, min(first + sizes.prompts_at_once, len(task)))
        completions = rollout.sample(
            policy,
            params,
            [prompts[int(number)] for number in ids],
            key=key,
            group_size=sizes.samples,
            max_new_tokens=sizes.max_new_tokens,
            prompt_ids=ids,
        )
        scores = scoring.score(task, ids, completions)
        finished = np.asarray(completions.finished)
        for place, number in enumerate(ids.tolist()):
            text = text_of(task.prompt(number))
            rows.append(
                {"prompt_id": number, "prompt": text} | _of_prompt(scores, place, finished[place], sizes.threshold)
            )
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {"metrics": {name: float(np.mean([row[name] for row in rows])) for name in names}, "prompts": rows}


def _of_prompt(scores: scoring.GroupScores, place: int, finished_g: np.ndarray, threshold: float) -> dict[str, Any]:
    """Measures of the completions of one prompt."""
    reward_g, answers = scores.reward[place], scores.answer[place]
    count, good = len(reward_g), int(np.sum(reward_g >= threshold))
    given = collections.Counter(answer for answer in answers if answer is not None)
    correct = {answer for answer, reward in zip(answers, reward_g, strict=True) if reward >= threshold} - {None}
    sizes = [2**power for power in range(count.bit_length()) if 2**power <= count]
    diverse = group_metrics.of_window({0: {**given, None: count - given.total()}})
    return {
        "reward": float(np.mean(reward_g, dtype=np.float64)),
        **{f"pass@{k}": diversity.pass_at_k(count, good, k) for k in sizes},
        "valid": given.total() / count,
        "answers/distinct": float(len(given)),
        "answers/good": float(len(correct)),
        "answers/effective": diverse["answers/effective"],
        "truncated": float(np.mean(~finished_g)),
        "counts": dict(given.most_common()),
    }


def as_json(result: dict[str, Any]) -> str:
    """The result as strict JSON."""
    return json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
