"""The task's verdict on a rollout, and answers as the indices that arrays hold."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax.parallel import hosts
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Context, Task
from mara_jax.tasks.checked import checked
from mara_jax.train import reward_model, watchdog

Answers = list[list[str | None]]  # of each prompt's completions


class GroupScores(NamedTuple):
    """Scores of p prompts' groups, on every process: reward [p, g]; answer, nested lists; columns, [p, g] each;
    classes: what is logged of the answers' classes, by name, where a run has any."""

    reward: np.ndarray
    answer: Answers
    columns: dict[str, np.ndarray]
    classes: Mapping[str, float] = {}


def score(
    task: Task,
    prompt_ids: np.ndarray,
    completions: rollout.Rollout,
    step: int = 0,
    ref_logp_pg: jax.Array | None = None,
    prompts: int | None = None,
) -> GroupScores:
    """Scores a rollout; each process scores the rows that it holds.

    Args:
      step: of the run, see `tasks.base.Context`; ref_logp_pg: log-probs of the completions under the reference policy
        (nats), for a task that reads them; prompts: how many are scored, the first ones; by default all.

    Raises:
      ValueError: a verdict that does not fit the completions.
    """
    p, g = completions.lengths.shape
    mine = np.flatnonzero(hosts.local_mask(completions.lengths))
    mine = mine if prompts is None else mine[mine < prompts * g]
    texts = [text for group in completions.text for text in group]
    ended = hosts.local_values(completions.finished).ravel()
    prompt_b = np.repeat(prompt_ids, g)
    ref_logp = None if ref_logp_pg is None else hosts.local_values(ref_logp_pg).ravel()[mine].tolist()
    learned = None
    if task.learned_reward is not None:
        asked = [task.prompt(number) for number in prompt_b[mine].tolist()]
        learned = reward_model.loaded(task.learned_reward).scores_of(asked, [texts[i] for i in mine])
    context = Context(step, ref_logp, learned)

    def score_mine() -> list[Any]:
        score = checked(task).score_in_run(
            prompt_b[mine].tolist(), [texts[i] for i in mine], ended[mine].tolist(), context
        )
        if hosts.several_processes():
            watchdog.entered("gathering of the scores of all processes")
        columns = {name: np.asarray(values).tolist() for name, values in score.columns.items()}
        return [mine.tolist(), np.asarray(score.reward).tolist(), list(score.answer), columns]

    parts = hosts.gather_json(hosts.raise_on_all_processes(score_mine))
    if len({tuple(sorted(part[3])) for part in parts}) > 1:
        raise ValueError(f"the task {task.name!r} names other columns on other processes: name the same on every call")
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
