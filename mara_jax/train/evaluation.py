"""A policy measured on the prompts of a task: rewards, pass@k, and how many different answers it gives."""

import collections
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax.core import diversity
from mara_jax.parallel import hosts
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Task, text_of
from mara_jax.train import group_metrics, scoring


class Sizes(NamedTuple):
    """How much is drawn: samples of each prompt, their length limit, and the reward from which on a completion is good.

    prompts_at_once, samples_at_once: prompts, and samples of each, of one call; slots: as of `rollout.sample`. They
    change what a call costs, and no completion.
    """

    samples: int
    max_new_tokens: int
    threshold: float
    prompts_at_once: int
    samples_at_once: int
    slots: int = 0


def measure(
    task: Task, policy: Policy, params: Any, prompts: Sequence[list[int]], key: jax.Array, sizes: Sizes
) -> dict[str, Any]:
    """Samples and scores completions of every prompt of a task; the same on every process.

    Args:
      prompts: token ids of each.

    Returns:
      `metrics`, means over the prompts, and `prompts`, the same of each with its answers' counts.
    """
    rows: list[dict[str, Any]] = []
    at_once = min(sizes.prompts_at_once, len(task))
    for first in range(0, len(task), at_once):
        ids = np.arange(first, min(first + at_once, len(task)))
        scores, finished_pg = _drawn(task, policy, params, prompts, key, np.resize(ids, at_once), sizes)
        for place, number in enumerate(ids.tolist()):
            text = text_of(task.prompt(number))
            rows.append(
                {"prompt_id": number, "prompt": text} | _of_prompt(scores, place, finished_pg[place], sizes.threshold)
            )
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {"metrics": {name: float(np.mean([row[name] for row in rows])) for name in names}, "prompts": rows}


def _drawn(
    task: Task,
    policy: Policy,
    params: Any,
    prompts: Sequence[list[int]],
    key: jax.Array,
    ids: np.ndarray,
    sizes: Sizes,
) -> tuple[scoring.GroupScores, np.ndarray]:
    """Scores of all samples of the prompts `ids` [p], and [p, samples] whether each ended.

    Every call has the same shapes, so that one program serves all: what is drawn too much is left out.
    """
    parts, finished = [], []
    for first in range(0, sizes.samples, sizes.samples_at_once):
        completions = rollout.sample(
            policy,
            params,
            [prompts[int(number)] for number in ids],
            key=key,
            group_size=sizes.samples_at_once,
            max_new_tokens=sizes.max_new_tokens,
            slots=sizes.slots,
            prompt_ids=ids,
            first_sample=first,
        )
        parts.append(scoring.score(task, ids, completions))
        finished.append(hosts.gather(completions.finished))
    reward_pg = np.concatenate([part.reward for part in parts], axis=1)[:, : sizes.samples]
    groups = zip(*(part.answer for part in parts), strict=True)
    answer_pg = [list(itertools.chain(*group))[: sizes.samples] for group in groups]
    return scoring.GroupScores(reward_pg, answer_pg, {}), np.concatenate(finished, axis=1)[:, : sizes.samples]


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
