"""Pairs of completions of a prompt, one better than the other: read from a file, or made from files of prompts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.policies.encoding import Prompt
from mara_jax.tasks import prompt_file
from mara_jax.tasks.base import TaskError, text_of
from mara_jax.tasks.rewards.matching import plain

EXAMPLE = '{"prompt": "Name a prime.", "chosen": "7", "rejected": "8"}'
PAIRS_OF_A_PROMPT = 16  # at most, of those that are made


class Pair(NamedTuple):
    """A prompt with two completions, the better one first."""

    prompt: Prompt
    chosen: str
    rejected: str


def read(path: str) -> list[Pair]:
    """The pairs of a file with the columns `prompt`, `chosen` and `rejected`: texts, or one message of the assistant.

    Raises:
      FileNotFoundError, ValueError: one line; the row that is no pair, by its place.
    """
    rows = prompt_file.read(path)
    pairs = [
        Pair(row["prompt"], *(_completion(rows, number, row, name) for name in ("chosen", "rejected")))
        for number, row in enumerate(rows)
    ]
    for number, pair in enumerate(pairs):
        if pair.chosen == pair.rejected:
            raise TaskError(
                f"{rows.where(number)}: chosen and rejected are both {pair.chosen!r:.60}, so that neither is better: "
                "delete the row"
            )
    return pairs


def _completion(rows: prompt_file.PromptFile, number: int, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content") if value[0].get("role") == "assistant" else None
    if not isinstance(value, str) or not value.strip():
        raise TaskError(
            f"{rows.where(number)}: its {name!r} is {row.get(name)!r:.60}, no text: a row is {EXAMPLE}, or has one "
            "message of the assistant in the place of each text"
        )
    return value


def made(paths: Iterable[str], seed: int) -> list[Pair]:
    """Pairs of the prompts of files: good answers with wrong ones, or completions with worse ones.

    A row with `answers` gives each of its answers, with answers of other prompts that are none of its own. A row with a
    `completion`, or several, gives each of those: every other one with a completion of another prompt, the rest with
    its own words in another order. The worse one is as long as the better one, in characters, where there is one.

    Args:
      paths: of files of prompts; seed: of which are taken, at most PAIRS_OF_A_PROMPT of a prompt.

    Raises:
      FileNotFoundError, ValueError: one line; a file whose rows have neither column.
    """
    rows = [row for path in paths for row in prompt_file.read(path)]
    good = [_texts(row) for row in rows]
    if not any(good):
        raise TaskError(f"no row of {', '.join(paths)} has `answers` or a `completion`, of which pairs are made")
    pool = list(dict.fromkeys(text for texts in good for text in texts))
    pairs: list[Pair] = []
    for number, (row, texts) in enumerate(zip(rows, good, strict=True)):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
        own = {plain(text) for text in texts}
        others = [text for text in pool if plain(text) not in own]
        words = "answers" not in row
        pairs += _of_prompt(row["prompt"], texts, others, words, random)
    if not pairs:
        raise TaskError(f"{', '.join(paths)}: no prompt has a text that is not as good for the others: add prompts")
    return pairs


def _texts(row: Mapping[str, Any]) -> list[str]:
    """The good completions of a row, without those that repeat."""
    value = row.get("answers") or row.get("completion") or []
    return list(dict.fromkeys(str(text) for text in (value if isinstance(value, list) else [value])))


def _of_prompt(
    prompt: Prompt, texts: Sequence[str], others: Sequence[str], shuffles: bool, random: np.random.Generator
) -> list[Pair]:
    pairs: dict[tuple[str, str], None] = {}
    for turn in range(PAIRS_OF_A_PROMPT if texts else 0):
        chosen = texts[turn % len(texts)] if turn < len(texts) else texts[int(random.integers(len(texts)))]
        mixed = _mixed(chosen, random) if shuffles and turn % 2 else chosen
        if mixed != chosen:
            pairs[chosen, mixed] = None
        elif others:
            pairs[chosen, _as_long(chosen, others, random)] = None
    return [Pair(prompt, *texts) for texts in pairs]


def _mixed(text: str, random: np.random.Generator) -> str:
    """The words of a text in another order."""
    words = text.split(" ")
    return " ".join(words[place] for place in random.permutation(len(words)))


def _as_long(text: str, others: Sequence[str], random: np.random.Generator) -> str:
    """One of the texts whose length is nearest to that of another."""
    gaps = np.array([abs(len(other) - len(text)) for other in others])
    nearest = np.flatnonzero(gaps == gaps.min())
    return others[int(random.choice(nearest))]


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the pairs for training, and of those held out: a prompt's pairs stay together.

    Raises:
      ValueError: a share that leaves one of the two empty.
    """
    prompts = list(dict.fromkeys(text_of(pair.prompt) for pair in pairs))
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(prompts))
    held_out = {prompts[place] for place in order[: round(share * len(prompts))]}
    if not 0 < len(held_out) < len(prompts):
        raise ValueError(
            f"--held_out={share:g} of {len(prompts)} prompts holds out {len(held_out)}: at least one must be held out, "
            "and one left for training"
        )
    apart = [text_of(pair.prompt) in held_out for pair in pairs]
    return [n for n, out in enumerate(apart) if not out], [n for n, out in enumerate(apart) if out]
