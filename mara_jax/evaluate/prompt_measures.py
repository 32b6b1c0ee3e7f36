"""What `evaluate run` measures beside what a run does: votes, texts, the task's columns; intervals over prompts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.core import diversity
from mara_jax.measures import bootstrap, embeddings, equivalence, ngrams, noveltybench, samples
from mara_jax.measures.embeddings import Embedder
from mara_jax.measures.equivalence import Equivalence
from mara_jax.train import evaluation
from mara_jax.train.evaluation import Group

MOST_VOTES = 64  # the exact majority@k takes time that grows with k
DISTINCT = (1, 2, 3)
READ = 10  # completions of a prompt that NoveltyBench reads, the first ones
INSTALLED = "installed"  # in the place of an embedder's directory


class Likeness(NamedTuple):
    """When two completions are the same, and what embeds them; None where that is not measured."""

    rule: Equivalence | None = None
    embedder: Embedder | None = None


NOTHING = Likeness()


def likeness_of(equal: str, similarity: float, embedder: str) -> Likeness:
    """What the flags ask for.

    Args:
      equal: exact, rouge1 or embedding.
      similarity: two texts are the same above it; 0: NoveltyBench's threshold for rouge1.
      embedder: a directory, INSTALLED, or empty.

    Raises:
      ValueError, FileNotFoundError: a rule without its threshold, or an embedder that is not there.
    """
    loaded = embeddings.load(None if embedder == INSTALLED else embedder) if embedder else None
    if equal == "exact":
        return Likeness(equivalence.exact(), loaded)
    if equal == "rouge1":
        return Likeness(equivalence.by_rouge(similarity or equivalence.ROUGE_THRESHOLD), loaded)
    if loaded is None or not similarity:
        missing = "--embedder" if loaded is None else "--similarity"
        raise ValueError(
            f"--equivalence=embedding needs {missing}: as in --embedder={INSTALLED} --similarity=.8, the cosine above "
            "which two completions count as the same, to be chosen on pairs that you have judged"
        )
    return Likeness(equivalence.by_embedding(loaded.embed, similarity, loaded.name), loaded)


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


def of_texts(group: Group, likeness: Likeness) -> dict[str, float]:
    """Measures of what the completions of one prompt say, and the task's own numbers of them.

    Returns:
      `novelty/distinct_k` and `novelty/utility_k` (reward units) of the first k, READ or all there are, by the rule;
      `embeddings/distance` and `embeddings/vendi`, of at least two; `task/NAME`, the mean of each column.
    """
    row, k = {}, min(READ, len(group.completions))
    if likeness.rule is not None and k:
        novel = noveltybench.novelty(group.prompt, group.completions[:k], group.reward[:k], likeness.rule)
        row |= {f"novelty/distinct_{k}": float(novel.distinct), f"novelty/utility_{k}": novel.utility}
    if likeness.embedder is not None:
        embeddings_ge = likeness.embedder.embed(group.completions)
        row["embeddings/distance"] = embeddings.mean_distance(embeddings_ge)
        row["embeddings/vendi"] = embeddings.vendi_score(embeddings_ge)
    return row | {f"task/{name}": float(np.mean(values)) for name, values in group.columns.items()}


def extended(
    measured: dict[str, Any], groups: Sequence[Group], threshold: float, seed: int, likeness: Likeness = NOTHING
) -> dict[str, Any]:
    """The measures of `train.evaluation.summary` with those of `of_group` and `of_texts`, and intervals of all.

    Args:
      measured: of the groups; groups: of all prompts; threshold: as of `of_group`; seed: of the resamples; likeness: as
        of `of_texts`.

    Returns:
      `metrics` and `prompts` with more keys; `intervals`, [low, high] of each metric, none for a single prompt;
      `bootstrap`, how they were made; and `texts`, the names of the rule and of the embedder.
    """
    rows = [
        row | of_group(group, threshold) | of_texts(group, likeness)
        for row, group in zip(measured["prompts"], groups, strict=True)
    ]
    metrics = evaluation.means(rows)
    intervals = {}
    if len(rows) > 1:
        for name in metrics:
            _, low, high = bootstrap.interval([row[name] for row in rows], seed=seed)
            intervals[name] = [low, high]
    how = {"level": bootstrap.LEVEL, "resamples": bootstrap.RESAMPLES, "seed": seed, "over": "prompts"}
    names = {name: one and one.name for name, one in likeness._asdict().items()}
    return measured | {
        "metrics": metrics, "prompts": rows, "intervals": intervals, "bootstrap": how, "texts": names
    }  # fmt: skip
