"""Measures of the words of completions: distinct-n, its expectation-adjusted form (EAD), self-BLEU, ROUGE-1."""

import collections
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

VOCABULARY = 50257  # of GPT-2, whatever counts as a word: as in Kirk et al. and their code
ORDERS = (1, 2, 3, 4, 5)
_ROUGE_WORD = re.compile(r"[a-z0-9]+")

Words = Callable[[str], Sequence[str]]


def distinct_n(texts: Sequence[str], n: int, words: Words = str.split) -> float:
    """Share of different n-grams among all n-grams of some texts, pooled.

    Args:
      texts: completions; those with fewer than n words have no n-gram.
      n: words of an n-gram.
      words: splits a text; by default at white space.

    Returns:
      From 1 / (number of n-grams) to 1; 0 where there are no n-grams.

    Source:
      Li et al. 2016, arXiv 1510.03055. It falls with the number and the length of the texts: see `adjusted_distinct_n`.
    """
    different, total = _counted(texts, n, words)
    return different / total if total else 0.0


def adjusted_distinct_n(texts: Sequence[str], n: int, vocabulary: int = VOCABULARY, words: Words = str.split) -> float:
    """Different n-grams, over how many as many independent uniform draws from a vocabulary would be expected to give.

    Args:
      texts, n, words: as of `distinct_n`.
      vocabulary: V, of how many the draws are, at least 2; it is the same for every n, as in the source.

    Returns:
      N / (V (1 - ((V - 1) / V)^C)) for N different ones among C n-grams; slightly above 1 where all are different;
      0 where there are no n-grams.

    Raises:
      ValueError: vocabulary is below 2.

    Source:
      Liu et al. 2022, arXiv 2202.13587.
    """
    if vocabulary < 2:
        raise ValueError(f"vocabulary={vocabulary}: it must be at least 2 for draws to differ")
    different, total = _counted(texts, n, words)
    # expm1 and log1p: 1 - (1 - 1 / V)^C loses digits where C is far below V.
    return different / (-vocabulary * math.expm1(total * math.log1p(-1 / vocabulary))) if total else 0.0


def adjusted_distinct(texts: Sequence[str], vocabulary: int = VOCABULARY, words: Words = str.split) -> float:
    """Expectation-adjusted distinct n-grams (EAD): the mean of `adjusted_distinct_n` over n = 1 to 5.

    Args:
      texts, vocabulary, words: as of `adjusted_distinct_n`. Texts of fewer than five words make it lower, as each n for
        which no text has an n-gram counts 0.

    Source:
      Kirk et al. 2023, arXiv 2310.06452, per-input diversity: of one prompt's completions, then a mean over prompts.
    """
    return float(np.mean([adjusted_distinct_n(texts, n, vocabulary, words) for n in ORDERS]))


def _counted(texts: Sequence[str], n: int, words: Words) -> tuple[int, int]:
    """How many different n-grams there are, and how many in all."""
    grams = collections.Counter()
    for text in texts:
        parts = tuple(words(text))
        grams.update(parts[start : start + n] for start in range(len(parts) - n + 1))
    return len(grams), grams.total()


def self_bleu(texts: Sequence[str]) -> float:
    """Mean sentence BLEU of each text against all others: 1 where all are equal, low where they share few words.

    Args:
      texts: completions of one prompt, at least two.

    Returns:
      From 0 to 1: BLEU-4 of package sacrebleu, with its tokenizer 13a, exponential smoothing, and only the orders for
      which a text has n-grams (effective order). An empty text has BLEU 0, even against another one.

    Raises:
      ValueError: fewer than two texts, or sacrebleu is not installed.

    Source:
      Zhu et al. 2018 (Texygen), arXiv 1802.01886; BLEU as in Post 2018, arXiv 1804.08771.
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU of {len(texts)} text: it compares each of two or more with the others")
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ValueError('self-BLEU needs sacrebleu: pip install "mara_jax[evaluate]"') from error
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, [*texts[:place], *texts[place + 1 :]]).score / 100 for place, text in enumerate(texts)
    ]
    return float(min(1.0, np.mean(scores)))  # sacrebleu's own 100 is larger by rounding


def rouge_1(first: str, second: str) -> float:
    """ROUGE-1 F1 of two texts: the harmonic mean of the shares of their words that the other has, too.

    Words are runs of a-z and 0-9 after lower-casing, without stemming, as of package rouge_score: a text in another
    script has none.

    Returns:
      From 0 to 1, symmetric; 0 where a text has no words, even for equal texts.

    Source:
      Lin 2004. NoveltyBench takes two generations as equivalent above .458.
    """
    left, right = (collections.Counter(_ROUGE_WORD.findall(text.lower())) for text in (first, second))
    shared = (left & right).total()
    # 2 P R / (P + R) with P = shared / |left| and R = shared / |right|
    return 2 * shared / (left.total() + right.total()) if shared else 0.0
