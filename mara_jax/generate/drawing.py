"""Completions of a prompt: drawn in chunks, given an answer each, counted."""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.markup import escape

from mara_jax.sampling import sample
from mara_jax.tasks import functions
from mara_jax.tasks.calls import Calls
from mara_jax.train.sampled import Sampled
from mara_jax.train.tables import NumberTable

TIME_LIMIT = 60.0  # seconds for a call of the answer function
MEMORY_LIMIT = 8.0  # GiB of its process
LONGEST_SHOWN = 100  # characters of an answer in the table


class Sizes(NamedTuple):
    """How much is drawn, and from which random stream: the prompt's number, its samples, tokens, rows at once, seed."""

    number: int
    samples: int
    max_new_tokens: int
    at_once: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """A completion: its text, its answer or None, its log-prob under the policy (nats), whether it ended by itself."""

    text: str
    answer: str | None
    logp: float
    finished: bool


@dataclasses.dataclass(frozen=True)
class Counted:
    """An answer (None: completions that give none): how often it was given, as a share, and an example's text."""

    answer: str | None
    count: int
    share: float
    text: str


def draw(sampled: Sampled, prompt: Any, sizes: Sizes, settings: Mapping[str, float]) -> list[Sample]:
    """Completions of one prompt, their texts as answers; the same whatever `sizes.at_once` is."""
    samples: list[Sample] = []
    tokens = sampled.encode([prompt], sizes.max_new_tokens)
    chunk = min(sizes.samples, sizes.at_once)
    for first in range(0, sizes.samples, chunk):
        drawn = sample(
            sampled.policy,
            sampled.params,
            tokens,
            key=jax.random.key(sizes.seed),
            group_size=chunk,
            max_new_tokens=sizes.max_new_tokens,
            prompt_ids=[sizes.number],
            first_sample=first,
            **settings,  # pyright: ignore[reportArgumentType]
        )
        logp = np.sum(np.asarray(drawn.logp[0], np.float64), axis=-1)
        rows = zip(drawn.text[0], logp.tolist(), np.asarray(drawn.finished[0]).tolist(), strict=True)
        samples += [Sample(text, text.strip(), value, ended) for text, value, ended in rows]
    return samples[: sizes.samples]


@contextlib.contextmanager
def answer_function(name: str | None, rows: Any) -> Iterator[tuple[str, Calls] | None]:
    """The function that gives completions their answers, in a process of its own; None without a name."""
    if name is None:
        yield None
        return
    calls = Calls([name], 1, TIME_LIMIT, MEMORY_LIMIT)
    try:
        columns = [column for column in getattr(rows, "columns", ()) if column not in ("prompt", "completion")]
        functions.check_arguments(name, calls.needed[name], ("prompt", "completion"), columns)
        yield name, calls
    finally:
        calls.close()


def answered(samples: Sequence[Sample], row: Mapping[str, Any], function: tuple[str, Calls] | None) -> list[Sample]:
    """The samples with the answers that the function gives them; ValueError where it fails."""
    if function is None:
        return list(samples)
    name, calls = function
    values = {column: [value] * len(samples) for column, value in row.items() if column not in ("prompt", "completion")}
    values |= {"prompts": [row["prompt"]] * len(samples), "completions": [one.text for one in samples]}
    outcomes = calls.of("answer", name, values, [0] * len(samples))
    for outcome in outcomes:
        if outcome.error is not None or not isinstance(outcome.value, str | None):
            raise ValueError(outcome.error or f"{name} returned {outcome.value!r:.60}: return a text, or None")
    return [dataclasses.replace(one, answer=outcome.value) for one, outcome in zip(samples, outcomes, strict=True)]


def counted(samples: Sequence[Sample]) -> list[Counted]:
    """The answers by how often they were given, the most frequent first; those of equal counts by their name."""
    counts = collections.Counter(one.answer for one in samples)
    examples = {one.answer: one.text for one in reversed(samples)}
    order = sorted(counts, key=lambda answer: (-counts[answer], answer is None, answer or ""))
    return [Counted(answer, counts[answer], counts[answer] / len(samples), examples[answer]) for answer in order]


def table(prompt: Any, samples: Sequence[Sample]) -> NumberTable:
    """The answers of one prompt with their counts, and how many they effectively are."""
    rows = counted(samples)
    given = [row for row in rows if row.answer is not None]
    total = sum(row.share for row in given)
    entropy = -sum(row.share / total * math.log(row.share / total) for row in given)
    effective = math.exp(entropy) if given else 0.0
    cut = sum(not one.finished for one in samples)
    words = f"{len(samples)} completions, {len(given)} different, effectively {effective:.2f}"
    words += f"; {cut} cut at the length limit" if cut else ""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    shown = NumberTable.with_headers("answer", "count", "share", title=f"{escape(text)}\n{words}")
    for row in rows:
        answer = "(no answer)" if row.answer is None else " ".join(row.answer.split())
        shown.add_row(escape(answer[:LONGEST_SHOWN]) or "(empty)", str(row.count), f"{row.share:.1%}")
    return shown
