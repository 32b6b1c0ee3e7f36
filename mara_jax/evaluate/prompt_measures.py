"""What `evaluate run` measures beside what a run does: votes, unseen answers, n-grams; intervals over prompts."""

from collections.abc import Sequence
from typing import Any

from mara_jax.core import diversity
from mara_jax.measures import bootstrap, ngrams, samples
from mara_jax.train import evaluation
from mara_jax.train.evaluation import Group

MOST_VOTES = 64  # the exact majority@k takes time that grows with k
DISTINCT = (1, 2, 3)


def of_group(group: Group, threshold: float) -> dict[str, float]:
    """More measures of the completions of one prompt.

    Args:
      threshold: a completion is good from this reward on; an answer is worth the share of its completions that are.

    Returns:
      `majority@k`; `answers/entropy_bits` and `answers/unseen`, Good-Turing over all completions; of their texts,
      split at white space, `ngrams/distinct-n` and `ngrams/ead`.
    """
    values = samples.answer_values(group.answer, (group.reward >= threshold).tolist())
    counts, worth = [count for count, _ in values.values()], [share for _, share in values.values()]
    total = len(group.reward)
    votes = [k for k in evaluation.powers(total) if k <= MOST_VOTES]
    unanswered = total - sum(counts)
    return {
        **{f"majority@{k}": samples.majority_at_k(counts, worth, k, unanswered) for k in votes},
        "answers/entropy_bits": diversity.entropy_bits(counts),
        "answers/unseen": samples.unseen_mass(counts, total),
        **{f"ngrams/distinct-{n}": ngrams.distinct_n(group.completions, n) for n in DISTINCT},
        "ngrams/ead": ngrams.adjusted_distinct(group.completions),
    }


def extended(measured: dict[str, Any], groups: Sequence[Group], threshold: float, seed: int) -> dict[str, Any]:
    """The measures of `train.evaluation.summary` with those of `of_group`, and intervals of all.

    Args:
      measured: of the groups; groups: of all prompts; threshold: as of `of_group`; seed: of the resamples.

    Returns:
      `metrics` and `prompts` with more keys; `intervals`, [low, high] of each metric, none for a single prompt; and
      `bootstrap`, how they were made.
    """
    rows = [row | of_group(group, threshold) for row, group in zip(measured["prompts"], groups, strict=True)]
    metrics = evaluation.means(rows)
    intervals = {}
    if len(rows) > 1:
        for name in metrics:
            _, low, high = bootstrap.interval([row[name] for row in rows], seed=seed)
            intervals[name] = [low, high]
    how = {"level": bootstrap.LEVEL, "resamples": bootstrap.RESAMPLES, "seed": seed, "over": "prompts"}
    return measured | {"metrics": metrics, "prompts": rows, "intervals": intervals, "bootstrap": how}
