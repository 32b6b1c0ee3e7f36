"""What keeps a run from learning though nothing is wrong with it, said once each, with the cure."""

from typing import Any

import numpy as np

from mara_jax.config import LanguageRun
from mara_jax.core import method_rules
from mara_jax.tasks.base import Task

STEPS = 3  # in a row before a warning; all steps of a shorter run
MOST = 0.5  # a larger share of groups or completions is most of them
COLLAPSED = 0.9  # share of a group that is one and the same text


class Warnings:
    """Looks at the steps of a run one after another, and at none from before a resume."""

    def __init__(self, run: LanguageRun, task: Task) -> None:
        self.run, self.task, self.steps = run, task, min(STEPS, run.steps)
        self.in_a_row: dict[str, int] = {}  # steps for which a condition has held
        self.said: set[str] = set()
        self.first_rewards: set[float] = set()

    def of_step(self, row: dict[str, Any], ids: np.ndarray, reward_pg: np.ndarray) -> list[str]:
        """Lines to show after a step: each warning once, when what it says has held for several steps.

        Args:
          row: the step's metrics.
          ids: [p] numbers of its prompts.
          reward_pg: rewards of its groups.
        """
        lines = []
        for name, text in self._conditions(row, ids, reward_pg).items():
            self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if text else 0
            if self.in_a_row[name] >= self.steps and name not in self.said:
                self.said.add(name)
                lines.append(f"WARNING: {text}")
        return lines

    def _conditions(self, row: dict[str, Any], ids: np.ndarray, reward_pg: np.ndarray) -> dict[str, str]:
        """What a warning would say of this step; empty where there is nothing to say."""
        run, share = self.run, row["completions/truncated"]
        limit, threshold = run.rollout.max_new_tokens, run.algorithm.threshold
        cut = (
            f"{share:.0%} of the completions are cut at rollout.max_new_tokens={limit}, before their end token, and a "
            "cut completion seldom has an answer: raise rollout.max_new_tokens, or teach it to end by warmup.steps"
        )
        unrewarded = _share_without_reward(reward_pg, threshold)
        same = (
            f"in {unrewarded:.0%} of the groups all rewards are equal and below algorithm.threshold={threshold:g}, so "
            "that no completion is preferred to another: raise rollout.group_size, reward a part of an answer, take "
            "easier prompts, or teach the format by warmup.steps"
        )
        return {
            "cut": cut if share > MOST else "",
            "no reward": same if unrewarded > MOST else "",
            "one text": self._one_text(row, ids, reward_pg),
            "one reward": self._one_reward(row["step"], reward_pg),
        }

    def _one_text(self, row: dict[str, Any], ids: np.ndarray, reward_pg: np.ndarray) -> str:
        """Of groups that are one text each; not of the one right answer to a question that has no other."""
        algorithm, share = self.run.algorithm, row["completions/commonest"]
        several = any(len(self.task.answer_set(int(number)) or ()) > 1 for number in ids)
        if reward_pg.shape[1] == 1 or share < COLLAPSED or (not several and np.mean(reward_pg) >= algorithm.threshold):
            return ""
        mara = "" if algorithm.method == "mara" else "set algorithm.method=mara, "
        return (
            f"{share:.0%} of a group's completions are one and the same text: the policy has collapsed to it, and a "
            f"group teaches nothing: {mara}raise algorithm.beta={algorithm.beta:g}, or lower optimiser.learning_rate"
        )

    def _one_reward(self, step: int, reward_pg: np.ndarray) -> str:
        """Of a run whose completions all have one and the same good reward from its first step on."""
        if step > self.steps or method_rules.resolved(self.run.algorithm).transform != "none":
            return ""
        self.first_rewards |= set(np.unique(reward_pg).tolist())
        best = max(self.first_rewards)
        if len(self.first_rewards) > 1 or best < self.run.algorithm.threshold:
            return ""
        return (
            f"every completion since the first step has the reward {best:g}, which leaves nothing to learn: take "
            "harder prompts, or look whether the reward tells completions apart"
        )


def _share_without_reward(reward_pg: np.ndarray, threshold: float) -> float:
    """Share of the groups whose rewards are equal and not good: neither a baseline nor MARA parts their completions."""
    if reward_pg.shape[1] == 1:
        return 0.0
    return float(np.mean((np.ptp(reward_pg, axis=1) == 0) & (reward_pg.max(axis=1) < threshold)))
