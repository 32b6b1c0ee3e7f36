"""Measures of words against hand arithmetic, simulation and the packages that others use."""

import builtins
import itertools
import math

import numpy as np
import pytest

from mara_jax.measures import ngrams

TEXTS = ["a b a b", "b a c", "a"]  # words a b a b b a c a; pairs ab ba ab, ba ac; triples aba bab, bac


def test_distinct_by_hand():
    assert [ngrams.distinct_n(TEXTS, n) for n in (1, 2, 3)] == pytest.approx([3 / 8, 3 / 5, 3 / 3])
    assert ngrams.distinct_n(TEXTS, 4) == 1 and ngrams.distinct_n(TEXTS, 5) == 0
    assert ngrams.distinct_n(["abc"], 1, words=list) == 1 and ngrams.distinct_n([], 1) == 0


def test_adjusted_distinct_by_hand():
    """Vocabulary of 2: of C draws 2 (1 - 2^-C) are expected to be different."""
    expected = [3 / (2 * (1 - 2**-8)), 3 / (2 * (1 - 2**-5)), 3 / (2 * (1 - 2**-3)), 1 / (2 * (1 - 2**-1)), 0]
    got = [ngrams.adjusted_distinct_n(TEXTS, n, vocabulary=2) for n in (1, 2, 3, 4, 5)]
    assert got == pytest.approx(expected)
    assert ngrams.adjusted_distinct(TEXTS, vocabulary=2) == pytest.approx(sum(expected) / 5)
    # Of two draws from GPT-2's vocabulary 2 - 1 / V are different.
    assert ngrams.adjusted_distinct_n(["x y"], 1) == pytest.approx(2 / (2 - 1 / 50257), rel=1e-12)
    with pytest.raises(ValueError, match="vocabulary=1"):
        ngrams.adjusted_distinct_n(TEXTS, 1, vocabulary=1)


def test_adjusted_distinct_does_not_fall_with_length_where_distinct_does():
    """Words drawn uniformly from 50: the adjusted measure is 1 for 20 words as for 500."""
    drawn = np.random.default_rng(0).integers(50, size=(400, 500)).astype(str)
    for length, plain in ((20, 0.83), (500, 0.1)):
        texts = [" ".join(row[:length]) for row in drawn]
        assert np.mean([ngrams.adjusted_distinct_n([text], 1, 50) for text in texts]) == pytest.approx(1, abs=0.01)
        assert np.mean([ngrams.distinct_n([text], 1) for text in texts]) == pytest.approx(plain, abs=0.01)


def plain_bleu(text, others):
    """Sentence BLEU of lower-case words, written from the definition, with sacrebleu's exponential smoothing."""
    words, references = text.split(), [other.split() for other in others]
    logs, smooth = [], 1.0
    for n in range(1, min(4, len(words)) + 1):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        clipped = 0
        for gram in set(grams):
            most = max(sum(tuple(r[i : i + n]) == gram for i in range(len(r) - n + 1)) for r in references)
            clipped += min(grams.count(gram), most)
        if not clipped:
            smooth *= 2
        logs.append(math.log(clipped / len(grams) if clipped else 1 / (smooth * len(grams))))
    closest = min((abs(len(r) - len(words)), len(r)) for r in references)[1]
    return min(1.0, math.exp(1 - closest / len(words))) * math.exp(np.mean(logs))


def test_self_bleu_is_bleu_written_from_its_definition():
    pytest.importorskip("sacrebleu")
    texts = ["the cat sat on the mat", "the cat sat on a mat", "a dog sat", "the dog ran far away today my friend"]
    scores = [plain_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert ngrams.self_bleu(texts) == pytest.approx(np.mean(scores), abs=1e-9)
    for pair in itertools.combinations(texts, 2):
        expected = (plain_bleu(pair[0], [pair[1]]) + plain_bleu(pair[1], [pair[0]])) / 2
        assert ngrams.self_bleu(pair) == pytest.approx(expected, abs=1e-9)


def test_self_bleu_of_equal_texts_is_one():
    pytest.importorskip("sacrebleu")
    assert ngrams.self_bleu(["one two three four five"] * 3) == 1 == ngrams.self_bleu(["one"] * 2)
    with pytest.raises(ValueError, match="1 text"):
        ngrams.self_bleu(["one"])


def test_without_sacrebleu_one_line_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def missing(name, *args, **named):
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return imported(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r'pip install "mara_jax\[evaluate\]"') as caught:
        ngrams.self_bleu(["a", "b"])
    assert len(str(caught.value).splitlines()) == 1


PAIRS = [
    # Three of five words, and all three of the other: 2 * 3 / (5 + 3).
    ("the cat sat on it", "The CAT, sat!", 6 / 8),
    ("a a a b", "a b b", 4 / 7),  # counts are clipped: one b, one a
    ("a a b", "a a c", 4 / 6),  # and so is a, twice
    ("it's 3.5 metres", "it s 3 5 metres", 1.0),
    ("over_the top", "over the top", 1.0),  # an underscore divides words
    ("one", "two", 0.0),
    ("", "", 0.0),
    ("привет", "привет", 0.0),
    ("naïve", "na ve", 1.0),
]


@pytest.mark.parametrize(("first", "second", "expected"), PAIRS)
def test_rouge_by_hand(first, second, expected):
    assert ngrams.rouge_1(first, second) == ngrams.rouge_1(second, first) == pytest.approx(expected)


def test_rouge_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"])
    words = np.array(["red", "Green", "blue,", "it's", "3.5", "naïve", "-"])
    generator = np.random.default_rng(0)
    drawn = [" ".join(generator.choice(words, size=generator.integers(8))) for _ in range(40)]
    pairs = [*((first, second) for first, second, _ in PAIRS), *itertools.pairwise(drawn)]
    for first, second in pairs:
        theirs = scorer.score(first, second)["rouge1"].fmeasure
        assert ngrams.rouge_1(first, second) == pytest.approx(theirs), (first, second)
