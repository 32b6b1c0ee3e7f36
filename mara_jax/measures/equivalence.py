"""When two completions of a prompt count as the same: rules, and the classes into which they divide completions."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mara_jax.measures import ngrams

ROUGE_THRESHOLD = 0.458  # NoveltyBench's for unigrams
CLASSIFIER_THRESHOLD = 0.102  # NoveltyBench's for the probability that two generations are similar
SHORT = 5  # words


class Equivalence(NamedTuple):
    """A rule, whose name travels with the numbers: same(prompt, representative, completion)."""

    name: str
    same: Callable[[str, str, str], bool]


class Partition(NamedTuple):
    """Classes of completions: class_g: [g] of each, numbered in the order in which they appear; rule: its name."""

    rule: str
    class_g: list[int]


def exact() -> Equivalence:
    """Texts that are equal but for white space at their ends."""
    return Equivalence("exact", lambda prompt, first, second: first.strip() == second.strip())


def by_answer(answer: Callable[[str, str], str | None], name: str = "answer") -> Equivalence:
    """Completions with the same answer; those without one are a class of their own.

    Args:
      answer: (prompt, completion) -> answer, or None; name: which answers these are.
    """
    return Equivalence(name, lambda prompt, first, second: answer(prompt, first) == answer(prompt, second))


def by_rouge(threshold: float = ROUGE_THRESHOLD) -> Equivalence:
    """Equal texts, and those with a ROUGE-1 F1 above a threshold: NoveltyBench's rule "unigram", which needs no model.

    ROUGE-1 reads words of a to z and digits, and is 0 for texts without any, such as empty ones: the benchmark takes
    equal ones of these as different.
    """
    return Equivalence(
        f"ROUGE-1 > {threshold:g}",
        lambda prompt, first, second: first == second or ngrams.rouge_1(first, second) > threshold,
    )


def by_embedding(
    embed: Callable[[Sequence[str]], np.ndarray], threshold: float, name: str = "embedding"
) -> Equivalence:
    """Texts whose embeddings' cosine is above a threshold; the prompt is not looked at.

    Args:
      embed: texts -> [n, e] rows of unit length, as `embeddings.Embedder.embed`; each text is embedded once.
      threshold: the benchmark has none for cosines: choose it on pairs that you have judged.
      name: of the embedder.
    """
    once = functools.lru_cache(maxsize=1 << 16)(lambda text: embed([text])[0])
    return Equivalence(
        f"{name} cosine > {threshold:g}", lambda prompt, first, second: bool(once(first) @ once(second) > threshold)
    )


def by_classifier(
    score: Callable[[str, str, str], float],
    name: str,
    threshold: float = CLASSIFIER_THRESHOLD,
    overlap_of_short: bool = False,
) -> Equivalence:
    """Texts that a classifier takes as similar; equal texts are, without being asked.

    Args:
      score: (prompt, representative, completion) -> probability that they are similar.
      name: of the classifier.
      threshold: above which they count as the same.
      overlap_of_short: where neither has more than five words, ask no classifier: they are the same where at least half
        as many different words are shared as the longer one has words. So the benchmark did as it was published; by now
        it compares equal texts only, because the overlap takes "do it" and "do not do it" as the same.
    """

    def same(prompt: str, first: str, second: str) -> bool:
        if overlap_of_short and _words(first, second) <= SHORT:
            shared = set(first.lower().split()) & set(second.lower().split())
            return 2 * len(shared) >= _words(first, second)
        return first == second or score(prompt, first, second) > threshold

    short = " or overlap of short" if overlap_of_short else ""
    return Equivalence(f"{name} > {threshold:g}{short}", same)


def _words(first: str, second: str) -> int:
    return max(len(first.split()), len(second.split()))


def partition(prompt: str, completions: Sequence[str], rule: Equivalence) -> Partition:
    """Divides completions into classes, greedily in their order.

    Each completion is compared with the representatives of the classes so far, in the order in which these began, and
    joins the first that the rule takes as the same; where there is none, it begins a class and represents it from then
    on. Later members are never compared with. So a rule that is not transitive gives classes that depend on the order.

    Args:
      prompt: what was asked; completions: [g] texts.

    Source:
      Zhang et al. 2025, arXiv 2504.05228, section 3, as `partition.py` of the benchmark's repository does.
    """
    representatives: list[str] = []
    class_g = []
    for completion in completions:
        number = next((n for n, one in enumerate(representatives) if rule.same(prompt, one, completion)), None)
        if number is None:
            number = len(representatives)
            representatives.append(completion)
        class_g.append(number)
    return Partition(rule.name, class_g)
