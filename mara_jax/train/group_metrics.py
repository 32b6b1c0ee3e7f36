"""Metrics of groups of completions, of a step and of a window of steps: answers, duplicates, equal rewards."""

import collections
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from mara_jax.core import diversity
from mara_jax.train.scoring import Answers, GroupScores

LONGEST_NAME = 80  # characters of an answer in metrics.jsonl; a longer one is cut and marked by its hash

Counts = dict[int, dict[str | None, int]]  # prompt -> answer -> how many completions gave it


def of_step(
    scores: GroupScores, tokens_pgt: np.ndarray, lengths_pg: np.ndarray, finished_pg: np.ndarray
) -> dict[str, float]:
    """Metrics of one step's groups.

    Args:
      scores: of p groups of g completions.
      tokens_pgt: their tokens, padded behind their lengths.
      lengths_pg: tokens of each, end token included.
      finished_pg: whether an end token came.

    Returns:
      `valid/fraction`, share of completions with an answer; `answers/distinct`, different answers of a group, a mean;
      `groups/equal_rewards`, share of groups whose rewards are all equal; `completions/duplicates`, share of
      completions that repeat an earlier one of their group; `completions/commonest`, share of a group that its most
      frequent completion is, a mean; `completions/truncated`, share without an end token;
      `task/NAME`, means of the task's own columns; and what `scores.classes` has.
    """
    answers = [[name for name in group if name is not None] for group in scores.answer]
    counted = np.arange(tokens_pgt.shape[-1]) < lengths_pg[..., None]
    repeats = [np.unique(group, axis=0, return_counts=True)[1] for group in np.where(counted, tokens_pgt, -1)]
    return {
        "valid/fraction": sum(map(len, answers)) / lengths_pg.size,
        "answers/distinct": float(np.mean([len(set(group)) for group in answers])),
        "groups/equal_rewards": float(np.mean(np.ptp(scores.reward, axis=1) == 0)),
        "completions/duplicates": 1 - sum(map(len, repeats)) / lengths_pg.size,
        "completions/commonest": float(np.mean([times.max() for times in repeats])) / lengths_pg.shape[1],
        "completions/truncated": float(np.mean(~finished_pg)),
        **scores.classes,
        **{f"task/{name}": float(np.mean(values)) for name, values in scores.columns.items()},
    }


def by_prompt(ids: np.ndarray, answers: Answers) -> list[list[Any]]:
    """[number, {answer: count}] of each prompt of a step; completions without an answer are counted under ""."""
    counts = {int(number): collections.Counter() for number in ids}
    for number, group in zip(ids, answers, strict=True):
        counts[int(number)].update("" if name is None else short(name) for name in group)
    return [[number, dict(counted)] for number, counted in counts.items()]


def good_by_prompt(ids: np.ndarray, answers: Answers, reward_pg: np.ndarray, threshold: float) -> list[list[Any]]:
    """As `by_prompt`, of completions with an answer and a reward from the threshold on; prompts without one, too."""
    counts = {int(number): collections.Counter() for number in ids}
    for number, group, good_g in zip(ids, answers, reward_pg >= threshold, strict=True):
        named = [name for name, good in zip(group, good_g, strict=True) if good and name is not None]
        counts[int(number)].update(map(short, named))
    return [[number, dict(counted)] for number, counted in counts.items()]


def short(name: str) -> str:
    """An answer as metrics.jsonl has it: never empty, which stands for none, and never long."""
    if 0 < len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 17]}#{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


def pooled(window: Iterable[list[list[Any]]]) -> Counts:
    """The counts of several steps, by prompt; completions without an answer under None."""
    counts: Counts = {}
    for row in window:
        for number, counted in row:
            total = counts.setdefault(number, {})
            for name, count in counted.items():
                total[name or None] = total.get(name or None, 0) + count
    return counts


def summed(row: list[list[Any]]) -> dict[str | None, int]:
    """The counts of one step over all of its prompts."""
    total: collections.Counter[str | None] = collections.Counter()
    for counted in pooled([row]).values():
        total.update(counted)
    return dict(total)


def of_window(counts: Counts) -> dict[str, float]:
    """How diverse answers are over a window of steps, as means over its prompts.

    Returns:
      `answers/entropy_bits`, entropy of a prompt's answers, and `answers/effective`, their effective number: 2 to the
      entropy. Prompts that no completion answered count with no diversity: 0 bits, 0 answers.
    """
    answered = [[count for name, count in counted.items() if name is not None] for counted in counts.values()]
    bits = [diversity.entropy_bits(group) for group in answered]
    effective = [2**value if group else 0.0 for value, group in zip(bits, answered, strict=True)]
    return {"answers/entropy_bits": float(np.mean(bits)), "answers/effective": float(np.mean(effective))}
