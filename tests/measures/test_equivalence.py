"""Rules of equivalence by hand, and the classes of a rule that is not transitive."""

import itertools

import numpy as np
import pytest

from mara_jax.measures import equivalence, ngrams
from mara_jax.measures.equivalence import Equivalence

NEAR = Equivalence("within 1", lambda prompt, first, second: abs(int(first) - int(second)) <= 1)


def same(rule, first, second):
    return rule.same("p", first, second)


def test_exact_and_answer():
    rule = equivalence.exact()
    assert same(rule, " one\n", "one") and not same(rule, "one", "One") and rule.name == "exact"
    rule = equivalence.by_answer(
        lambda prompt, text: text[:1] if text.startswith(prompt) else None, name="first letter"
    )
    assert same(rule, "pa", "pb") and not same(rule, "pa", "b") and same(rule, "a", "b")  # neither has one
    assert rule.name == "first letter"


@pytest.mark.parametrize("text", ["", "\u6771\u4eac", "!?"])
def test_equal_texts_without_a_word_of_a_to_z_are_one(text):
    """ROUGE-1 is 0 for these, so that a policy that says nothing would seem to say ten things."""
    assert ngrams.rouge_1(text, text) == 0
    assert same(equivalence.by_rouge(), text, text) and not same(equivalence.by_rouge(), text, "7")
    assert equivalence.partition("q", [text] * 10, equivalence.by_rouge()).class_g == [0] * 10


def test_rouge_is_above_the_threshold_and_not_at_it():
    """F1 of 11 and 13 words of which s are shared is s / 12."""
    first = " ".join(map(str, range(11)))
    for shared, expected in ((5, False), (6, True)):
        second = " ".join([*map(str, range(shared)), *"abcdefghijklm"[shared:]])
        assert same(equivalence.by_rouge(), first, second) is expected  # .417 and .5 beside .458
        assert same(equivalence.by_rouge(shared / 12), first, second) is False
    assert equivalence.by_rouge().name == "ROUGE-1 > 0.458"


def test_embeddings_are_computed_once_a_text():
    asked = []

    def embed(texts):
        asked.extend(texts)
        angles = np.array([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    rule = equivalence.by_embedding(embed, np.cos(0.5), name="angle")
    assert same(rule, "0", "0.49") and not same(rule, "0", "0.51") and same(rule, "0.49", "0.51")
    assert asked == ["0", "0.49", "0.51"] and rule.name == "angle cosine > 0.877583"


def test_classifier_is_asked_for_what_differs():
    asked = []

    def score(prompt, first, second):
        asked.append((prompt, first, second))
        return 0.102 if "far" in second else 0.11

    rule = equivalence.by_classifier(score, "deberta")
    assert same(rule, "x", "x") and not asked
    assert same(rule, "x", "near") and not same(rule, "x", "far") and asked == [("p", "x", "near"), ("p", "x", "far")]
    assert rule.name == "deberta > 0.102"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Blue", "blue", True),
        ("blue", "red", False),
        ("do it", "do not do it", True),  # two of four words
        ("a b", "a c d e f", False),  # one of five
        ("a b c", "a b x y z", False),  # two of five
        ("a b c", "c b a y z", True),  # three of five
    ],
)
def test_short_texts_as_the_benchmark_was_published(first, second, expected):
    def never(prompt, first, second):
        raise AssertionError

    assert same(equivalence.by_classifier(never, "none", overlap_of_short=True), first, second) is expected
    asked = equivalence.by_classifier(lambda *three: 1.0, "always", overlap_of_short=True)
    assert same(asked, "blue", "one two three four five six")  # six words: the classifier decides


def by_the_benchmark_s_loop(prompt, completions, rule):
    """From each completion without a class on, all later ones that are like it: the loop as first published."""
    class_g = [-1] * len(completions)
    for i, j in itertools.product(range(len(completions)), repeat=2):
        if i == j and class_g[i] < 0:
            class_g[i] = representative = max(class_g) + 1
            for later in range(i + 1, len(completions)):
                if class_g[later] < 0 and rule.same(prompt, completions[i], completions[later]):
                    class_g[later] = representative
    return class_g


def test_partition_compares_with_representatives_alone():
    """1 and 2 are near, 2 and 3 are, 1 and 3 are not: the first of a class decides, and the first class takes."""
    assert equivalence.partition("p", ["1", "2", "3"], NEAR) == ("within 1", [0, 0, 1])
    assert equivalence.partition("p", ["2", "1", "3"], NEAR).class_g == [0, 0, 0]
    assert equivalence.partition("p", ["1", "3", "2"], NEAR).class_g == [0, 1, 0]  # near both: the earlier class
    assert equivalence.partition("p", [], NEAR).class_g == []
    directed = Equivalence("contains", lambda prompt, representative, text: representative in text)
    assert equivalence.partition("p", ["a", "ab", "b", "ab"], directed).class_g == [0, 0, 1, 0]
    assert equivalence.partition("p", ["ab", "a"], directed).class_g == [0, 1]  # the representative comes first


def test_partition_is_the_benchmark_s():
    generator = np.random.default_rng(0)
    for _ in range(200):
        drawn = [str(number) for number in generator.integers(8, size=generator.integers(1, 10))]
        assert equivalence.partition("p", drawn, NEAR).class_g == by_the_benchmark_s_loop("p", drawn, NEAR)
