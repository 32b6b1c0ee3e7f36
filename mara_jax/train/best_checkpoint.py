"""Which checkpoint is the best: by one measure of the evaluations, or the most covering one at equal reward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mara_jax.config import COVERAGE
from mara_jax.core import diversity
from mara_jax.measures import bootstrap


class Covered(NamedTuple):
    """An evaluation as `most_covering` compares it.

    good: number of different good answers of a prompt, mean over the prompts; reward_p: mean reward of each prompt;
    pass_1: mean share of good completions; samples: completions of each prompt.
    """

    good: float
    reward_p: list[float]
    pass_1: float
    samples: int

    @property
    def reward(self) -> float:
        """Mean over the prompts."""
        return sum(self.reward_p) / len(self.reward_p)


Score = float | Covered
Choice = Callable[[Sequence[int], Mapping[int, Any]], int | None]  # (saved steps, scores by steps) -> a saved step


def chosen_by(measure: str) -> Choice:
    """How the best of the saved steps is chosen by a measure."""
    return most_covering if measure == COVERAGE else highest


def score(measure: str, row: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]], samples: int) -> Score | None:
    """What is compared of an evaluation; None where it lacks the measure, as of other settings.

    Args:
      row: its means over the prompts; prompts: its measures of each; samples: completions of each prompt.
    """
    if measure != COVERAGE:
        return row.get(measure)
    if not prompts:
        return None
    return Covered(row["answers/good"], [one["reward"] for one in prompts], row["pass@1"], samples)


def highest(saved: Sequence[int], scores: Mapping[int, float]) -> int | None:
    """The earliest of the saved steps with the highest score; None where none has one."""
    return max((step for step in sorted(saved) if step in scores), key=lambda step: scores[step], default=None)


def most_covering(saved: Sequence[int], scores: Mapping[int, Covered]) -> int | None:
    """Of the saved steps whose reward equals the best of all evaluations, the one with most good answers.

    Equal means within the interval, see `equal_reward`. The best reward is that of all evaluations after the first
    step, of those too whose checkpoint is gone: rewards could else drift down, each time within the interval. Where no
    saved step has an equal reward, that with the highest is chosen; of equal ones the earliest.
    """
    known = [step for step in sorted(saved) if step in scores]
    if not known:
        return None
    best = max((scores[step] for step in sorted(scores) if step), key=lambda one: one.reward)
    equal = [step for step in known if equal_reward(best, scores[step])]
    if not equal:
        return max(known, key=lambda step: scores[step].reward)
    return max(equal, key=lambda step: (scores[step].good, scores[step].reward))


def equal_reward(best: Covered, other: Covered) -> bool:
    """Whether an evaluation's reward is within its interval of the best.

    It is where the 95 % interval of best - other, of a bootstrap over the prompts that takes the same ones for both,
    reaches 0. Of a single prompt the shares of good completions are compared: the other's with Wilson's interval of the
    best's.
    """
    if len(best.reward_p) > 1:
        return bootstrap.difference(best.reward_p, other.reward_p).low <= 0
    low, _ = diversity.interval(best.pass_1 * best.samples, best.samples)
    return other.pass_1 >= low
