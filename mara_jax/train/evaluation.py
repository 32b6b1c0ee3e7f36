"""A policy measured on the prompts of a task: rewards, pass@k, and how many different answers it gives."""

import collections
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax.core import diversity
from mara_jax.parallel import hosts
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Task, text_of
from mara_jax.train import group_metrics, scoring, watchdog


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


class Group(NamedTuple):
    """The completions of one prompt, with their scores.

    prompt_id: its number in the task; prompt: as one text; completions: [g] texts, empty where another process holds
    them; reward, answer, finished: [g] of each, on every process; finished: whether an end token came; columns: other
    numbers of each that the task returns, by name.
    """

    prompt_id: int
    prompt: str
    completions: list[str]
    reward: np.ndarray
    answer: list[str | None]
    finished: np.ndarray
    columns: Mapping[str, np.ndarray] = {}


def measure(
    task: Task, policy: Policy, params: Any, prompts: Sequence[list[int]], key: jax.Array, sizes: Sizes
) -> dict[str, Any]:
    """Samples and scores completions of every prompt of a task; the same on every process.

    Args:
      prompts: token ids of each.

    Returns:
      As of `summary`.
    """
    return summary(draw(task, policy, params, prompts, key, sizes), sizes.threshold)


def draw(
    task: Task, policy: Policy, params: Any, prompts: Sequence[list[int]], key: jax.Array, sizes: Sizes
) -> list[Group]:
    """Samples and scores completions, a group for every prompt of a task; arguments as of `measure`."""
    groups: list[Group] = []
    at_once = min(sizes.prompts_at_once, len(task))
    for first in range(0, len(task), at_once):
        ids = np.arange(first, min(first + at_once, len(task)))
        groups += _drawn(task, policy, params, prompts, key, np.resize(ids, at_once), sizes)[: len(ids)]
    return groups


def summary(groups: Sequence[Group], threshold: float) -> dict[str, Any]:
    """Measures of groups of completions.

    Args:
      threshold: a completion is good from this reward on.

    Returns:
      `metrics`, means over the prompts, and `prompts`, the same of each with its answers' counts.
    """
    rows = [{"prompt_id": group.prompt_id, "prompt": group.prompt} | _of_prompt(group, threshold) for group in groups]
    return {"metrics": means(rows), "prompts": rows}


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over the prompts of each measure of their rows: of each value that is a float."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def _drawn(
    task: Task,
    policy: Policy,
    params: Any,
    prompts: Sequence[list[int]],
    key: jax.Array,
    ids: np.ndarray,
    sizes: Sizes,
) -> list[Group]:
    """The groups of the prompts `ids` [p].

    Every call has the same shapes, so that one program serves all: what is drawn too much is left out.
    """
    scores, texts, finished = [], [], []
    for first in range(0, sizes.samples, sizes.samples_at_once):
        watchdog.entered("evaluation")
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
        scores.append(scoring.score(task, ids, completions))
        texts.append(completions.text)
        finished.append(hosts.gather(completions.finished))
    reward_pg = np.concatenate([part.reward for part in scores], axis=1)[:, : sizes.samples]
    finished_pg = np.concatenate(finished, axis=1)[:, : sizes.samples]
    text_pg, answer_pg = _joined(texts, sizes.samples), _joined([part.answer for part in scores], sizes.samples)
    columns = {
        name: np.concatenate([part.columns[name] for part in scores], axis=1)[:, : sizes.samples]
        for name in scores[0].columns
    }
    return [
        Group(number, text_of(task.prompt(number)), text_pg[row], reward_pg[row], answer_pg[row], finished_pg[row],
              {name: values_pg[row] for name, values_pg in columns.items()})
        for row, number in enumerate(ids.tolist())
    ]  # fmt: skip


def _joined(parts: Sequence[Sequence[Sequence[Any]]], samples: int) -> list[list[Any]]:
    """The first samples of each prompt, from several calls."""
    return [list(itertools.chain(*group))[:samples] for group in zip(*parts, strict=True)]


def powers(count: int) -> list[int]:
    """1, 2, 4, ... up to `count`: the k of pass@k."""
    return [2**power for power in range(count.bit_length())]


def _of_prompt(group: Group, threshold: float) -> dict[str, Any]:
    """Measures of the completions of one prompt."""
    count, good = len(group.reward), int(np.sum(group.reward >= threshold))
    given = collections.Counter(answer for answer in group.answer if answer is not None)
    correct = {answer for answer, reward in zip(group.answer, group.reward, strict=True) if reward >= threshold}
    diverse = group_metrics.of_window({0: {**given, None: count - given.total()}})
    return {
        "reward": float(np.mean(group.reward, dtype=np.float64)),
        **{f"pass@{k}": diversity.pass_at_k(count, good, k) for k in powers(count)},
        "valid": given.total() / count,
        "answers/distinct": float(len(given)),
        "answers/good": float(len(correct - {None})),
        "answers/effective": diverse["answers/effective"],
        "truncated": float(np.mean(~group.finished)),
        "counts": dict(given.most_common()),
    }


def as_json(result: dict[str, Any]) -> str:
    """The result as strict JSON."""
    return json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
