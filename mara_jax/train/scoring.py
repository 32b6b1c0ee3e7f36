"""The task's verdict on a rollout, and answers as the indices that arrays hold."""

import math
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.parallel import hosts
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Score, Task

Answers = list[list[str | None]]  # of each prompt's completions


class GroupScores(NamedTuple):
    """Scores of p prompts' groups, on every process: reward [p, g]; answer, nested lists; columns, [p, g] each."""

    reward: np.ndarray
    answer: Answers
    columns: dict[str, np.ndarray]


def score(task: Task, prompt_ids: np.ndarray, completions: rollout.Rollout) -> GroupScores:
    """Scores a rollout; each process scores the rows that it holds.

    Raises:
      ValueError: a verdict that does not fit the completions.
    """
    p, g = completions.lengths.shape
    mine = np.flatnonzero(hosts.local_mask(completions.lengths))
    texts = [text for group in completions.text for text in group]
    ended = hosts.local_values(completions.finished).ravel()
    prompt_b = np.repeat(prompt_ids, g)

    def score_mine() -> list[Any]:
        numbers = prompt_b[mine].tolist()
        return [
            mine.tolist(),
            *_checked(task, _verdict(task, numbers, [texts[i] for i in mine], ended[mine].tolist()), numbers),
        ]

    parts = hosts.gather_json(hosts.raise_on_all_processes(score_mine))
    reward_b = np.zeros(p * g, np.float32)
    answer_b: list[str | None] = [None] * (p * g)
    columns = {name: np.zeros((p, g), np.float32) for name in parts[0][3]}
    for rows, reward, answer, values in reversed(parts):  # of a row that several processes hold the first one's counts
        reward_b[rows] = reward
        for row, name in zip(rows, answer, strict=True):
            answer_b[row] = name
        for name, column in values.items():
            columns[name].ravel()[rows] = column
    return GroupScores(reward_b.reshape(p, g), [answer_b[i * g : (i + 1) * g] for i in range(p)], columns)


def _verdict(task: Task, numbers: list[int], texts: list[str], ended: list[bool]) -> Score:
    """What the task returns; what it raises becomes one line that names the place."""
    try:
        verdict = task.score(numbers, texts, ended)
    except (ValueError, OSError):
        raise
    except Exception as error:  # a task is somebody's Python: it can fail in any way
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"the task {task.name!r} failed to score: {type(error).__name__}: {error} ({place.filename}, line "
            f"{place.lineno})"
        ) from error
    if not isinstance(verdict, Score):
        raise ValueError(f"the task {task.name!r} returned {verdict!r:.80} instead of a mara_jax.tasks.Score")
    return verdict


def _numbers(task: Task, column: str, values: Any, numbers: list[int]) -> np.ndarray:
    """One number for each completion, none of them NaN or infinite."""
    name = f"the task {task.name!r} returned {column!r}"
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} that are no numbers ({error})") from error
    if array.shape != (len(numbers),):
        raise ValueError(f"{name} of shape {array.shape} for {len(numbers)} completions")
    for number, value in zip(numbers, array.tolist(), strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{name} {value} for a completion of prompt {number}: return finite numbers")
    return array


def _checked(
    task: Task, verdict: Score, numbers: list[int]
) -> tuple[list[float], list[str | None], dict[str, list[float]]]:
    """A verdict on completions of these prompts as plain lists; answers belong to the declared set, if there is one."""
    count, name = len(numbers), f"the task {task.name!r}"
    columns = {"reward": verdict.reward, **verdict.columns}
    columns = {column: _numbers(task, column, values, numbers) for column, values in columns.items()}
    answers = list(verdict.answer)
    if len(answers) != count:
        raise ValueError(
            f"{name} returned {len(answers)} answers for {count} completions: return one for each, or None"
        )
    declared = {number: task.answer_set(number) for number in set(numbers)}
    for number, answer in zip(numbers, answers, strict=True):
        if answer is not None and not isinstance(answer, str):
            raise ValueError(f"{name} returned the answer {answer!r} to prompt {number}: return a text, or None")
        known = declared[number]
        if answer is not None and known is not None and answer not in known:
            raise ValueError(
                f"{name} returned the answer {answer!r} to prompt {number}, whose answer set lacks it: add it"
            )
    reward = columns.pop("reward").tolist()
    return reward, answers, {column: values.tolist() for column, values in columns.items()}


class AnswerIndices:
    """Indices of the answers of some prompts, from 0 in the order in which they are seen, -1 for none.

    An index belongs to its prompt: the same answer has the same index in each array of that prompt.
    """

    def __init__(self, prompts: int) -> None:
        self.index_p: list[dict[str, int]] = [{} for _ in range(prompts)]

    def of(self, answers: Sequence[Sequence[str | None]]) -> np.ndarray:
        """[p, g] int32 of g answers of each prompt."""
        rows = [
            [-1 if name is None else index.setdefault(name, len(index)) for name in group]
            for index, group in zip(self.index_p, answers, strict=True)
        ]
        return np.array(rows, np.int32)
