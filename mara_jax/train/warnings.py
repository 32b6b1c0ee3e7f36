"""What keeps a run from learning though nothing is wrong with it, said once each, with the cure."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from mara_jax.config import LanguageRun
from mara_jax.core import method_rules
from mara_jax.tasks.base import Task
from mara_jax.train.answer_classes import alone_in_reference
from mara_jax.train.reference_samples import PromptSamples

STEPS = 3  # in a row before a warning; all steps of a shorter run
AT_ONCE = ("sampler", "weights")  # one step is enough for these
MOST = 0.5  # a larger share of groups or completions is most of them
BEYOND = 0.05  # share of the good completions that may be without a class
COLLAPSED = 0.9  # share of a group that is one and the same text
OUTWEIGHS = 10  # times the largest reward, or 1 where that is more: what one sample may be worth in the KL term
# Nats a token by which rounding lets the sampler's log-probs of what it drew differ from the trainer's, by the dtype of
# the matmuls; float32 is about 1e-8 in full precision, and 3e-4 where it is computed as TF32.
ROUNDING = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2}


class Warnings:
    """Looks at the steps of a run one after another, and at none from before a resume."""

    def __init__(self, run: LanguageRun, task: Task) -> None:
        self.run, self.task, self.steps = run, task, min(STEPS, run.steps)
        self.in_a_row: dict[str, int] = {}  # steps for which a condition has held
        self.said: set[str] = set()
        self.first_rewards: set[float] = set()

    def of_step(self, row: dict[str, Any], ids: np.ndarray, reward_pg: np.ndarray) -> list[str]:
        """Lines to show after a step: each warning once, when it has held for STEPS steps (AT_ONCE: for one).

        Args:
          row: the step's metrics.
          ids: [p] numbers of its prompts.
          reward_pg: rewards of its groups.
        """
        lines = []
        for name, text in self._conditions(row, ids, reward_pg).items():
            self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if text else 0
            if self.in_a_row[name] >= (1 if name in AT_ONCE else self.steps) and name not in self.said:
                self.said.add(name)
                lines.append(f"WARNING: {text}")
        return lines

    def _conditions(self, row: dict[str, Any], ids: np.ndarray, reward_pg: np.ndarray) -> dict[str, str]:
        """What a warning would say of this step; empty where there is nothing to say."""
        run, share = self.run, row["completions/truncated"]
        limit, threshold = run.rollout.max_new_tokens, threshold_of(run, row)
        cut = (
            f"{share:.0%} of the completions are cut at rollout.max_new_tokens={limit}, before their end token, and a "
            "cut completion seldom has an answer: raise rollout.max_new_tokens, or teach it to end by warmup.steps"
        )
        unrewarded = _share_without_reward(reward_pg, threshold)
        same = (
            f"in {unrewarded:.0%} of the groups all rewards are equal and below {_words_of(run, threshold)}, so "
            "that no completion is preferred to another: raise rollout.group_size, reward a part of an answer, take "
            "easier prompts, or teach the format by warmup.steps"
        )
        return {
            "sampler": _sampler(run, row),
            "cut": cut if share > MOST else "",
            "no reward": same if unrewarded > MOST else "",
            "one text": self._one_text(row, ids, reward_pg),
            "one reward": self._one_reward(row["step"], reward_pg),
            "lone": _lone(run, row),
            "alone": _alone(run, row.get("answers/alone", 0.0), "good completions"),
            "full": _full(run, row.get("answers/beyond_limit", 0.0)),
            "weights": _weights(run, row.get("objective/weights/largest_log"), float(np.abs(reward_pg).max())),
        }

    def _one_text(self, row: dict[str, Any], ids: np.ndarray, reward_pg: np.ndarray) -> str:
        """Of groups that are one text each; not of the one right answer to a question that has no other."""
        algorithm, share = self.run.algorithm, row["completions/commonest"]
        several = any(len(self.task.answer_set(int(number)) or ()) > 1 for number in ids)
        good = np.mean(reward_pg) >= threshold_of(self.run, row)
        if reward_pg.shape[1] == 1 or share < COLLAPSED or (not several and good):
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


def threshold_of(run: LanguageRun, row: dict[str, Any]) -> float:
    """The reward from which a completion of a step is good; +inf where none is. row: its metrics."""
    return row.get("mara/threshold", run.algorithm.threshold)


def _words_of(run: LanguageRun, threshold: float) -> str:
    moves = method_rules.moves_threshold(run.algorithm)
    return "mara/threshold, which moves" if moves else f"algorithm.threshold={threshold:g}"


def _sampler(run: LanguageRun, row: dict[str, Any]) -> str:
    """Of a sampler that is not the policy which is trained.

    The tokens are the sampler's own, so that the mean difference estimates KL(sampler || trainer): no two mistakes
    cancel in it.
    """
    dtype, limit = run.policy.compute_dtype, ROUNDING[run.policy.compute_dtype]
    gap = row.get("sampler/logp_gap", 0.0) / max(row.get("length/mean", 1.0), 1.0)
    if not abs(gap) > limit:
        return ""
    return (
        f"step {row['step']}: the sampler's and the trainer's log-probs of the same tokens differ by {gap:.1e} nats a "
        f"token (sampler/logp_gap), and rounding in {dtype} explains {limit:.0e}: what is trained is not the policy "
        "that draws. Look at the precision of the matmuls, try policy.attention=xla, or set algorithm.truncate=2"
    )


def _lone(run: LanguageRun, row: dict[str, Any]) -> str:
    """Of groups with fewer than two good completions, where the threshold moves; not before there is one."""
    share = row.get("mara/groups_with_two_good", 1.0)
    if share > MOST or method_rules.rows(run.algorithm)[0].anchor is None or math.isinf(row["mara/threshold"]):
        return ""
    return (
        f"only {share:.0%} of the groups have two completions that are good, and MARA tells good ones of one prompt "
        f"apart: lower algorithm.threshold_percentile={run.algorithm.threshold_percentile:g} or algorithm.threshold="
        f"{run.algorithm.threshold:g}, its floor, or raise rollout.group_size"
    )


def _alone(run: LanguageRun, share: float, what: str) -> str:
    """Of good completions each of which is a class of its own."""
    if share <= MOST:
        return ""
    return (
        f"{share:.0%} of the {what} are alone in their class (task.equivalence={run.task.equivalence}), and where each "
        "is an answer of its own MARA over answers tells none apart and pays for being unlike all others: name a "
        "coarser equivalence, or a task.answer that extracts what matters"
    )


def of_lone_answers(run: LanguageRun, samples: Iterable[PromptSamples]) -> str | None:
    """A line to show before the first step where most good samples of the reference policy are alone in their class."""
    share = alone_in_reference(samples, run.algorithm.threshold)
    words = _alone(run, share, "good samples of the reference policy")
    return f"WARNING: {words}" if words else None


def _full(run: LanguageRun, share: float) -> str:
    """Of good completions for whose classes there is no room."""
    if share <= BEYOND:
        return ""
    return (
        f"{share:.0%} of the good completions have no class, as their prompts have task.most_classes="
        f"{run.task.most_classes} already, and are not augmented: raise it, or name a coarser task.equivalence"
    )


def _weights(run: LanguageRun, largest_log: float | None, reward: float) -> str:
    """Of a forward KL whose lifted references leave nothing of the reward.

    largest_log: log of the largest weight of a sample in the KL term (nats); None where there is none, or an update was
    skipped. reward: the largest absolute reward.
    """
    algorithm = run.algorithm
    if largest_log is None or algorithm.method != "mara":
        return ""
    worth = algorithm.beta * math.exp(largest_log) / run.rollout.group_size
    if not worth > OUTWEIGHS * max(reward, 1.0):
        return ""
    other = ", or algorithm.anchor=answer, whose classes are less far apart" if algorithm.anchor == "string" else ""
    return (
        f"a single completion has the weight e^{largest_log:.0f} in the forward KL (objective/weights/largest_log), "
        "which leaves nothing of the rewards: MARA lifts the reference's probability of every good one to that of the "
        f"likeliest, and over long texts these lie far apart: set algorithm.kl=reverse{other}"
    )


def of_moving_threshold(run: LanguageRun) -> str | None:
    """A line to show before the first step of a run whose threshold moves: what a forecast can mean."""
    if not method_rules.moves_threshold(run.algorithm):
        return None
    return (
        "WARNING: the threshold moves with the policy (algorithm.threshold_percentile="
        f"{run.algorithm.threshold_percentile:g}): no fixed objective is maximised, so that there is no forecast of an "
        "optimum and no gap/*. A forecast for one constant threshold (predict --run=WORKDIR --threshold=R) says where "
        "training would go if mara/threshold stayed at R; the first step has no earlier rewards, and no completion of "
        "it is good"
    )


def _share_without_reward(reward_pg: np.ndarray, threshold: float) -> float:
    """Share of the groups whose rewards are equal and not good: neither a baseline nor MARA parts their completions."""
    if reward_pg.shape[1] == 1:
        return 0.0
    return float(np.mean((np.ptp(reward_pg, axis=1) == 0) & (reward_pg.max(axis=1) < threshold)))
