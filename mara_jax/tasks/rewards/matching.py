"""Completions compared with what their row says: one solution, a list of answers, a regular expression.

Texts are compared without surrounding white space, a full stop at their end, and the difference of capital letters.
"""

import re
from collections.abc import Sequence

from mara_jax.tasks.base import Prompt, TaskError, text_of


def exact_match(completions: Sequence[Prompt], solution: Sequence[str]) -> list[float]:
    """1 where a completion is its row's `solution`, else 0."""
    return [float(plain(text_of(text)) == plain(wanted)) for text, wanted in zip(completions, solution, strict=True)]


def one_of(completions: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[float]:
    """1 where a completion is one of its row's `answers`, else 0."""
    return [float(which_of(text, known) is not None) for text, known in zip(completions, answers, strict=True)]


def which_of(completion: Prompt, answers: Sequence[str]) -> str | None:
    """An answer function: which of its row's `answers` a completion is, in the row's spelling; None for none."""
    return {plain(answer): answer for answer in answers}.get(plain(text_of(completion)))


def full_match(completions: Sequence[Prompt], pattern: Sequence[str]) -> list[float]:
    """1 where the whole of a completion, without surrounding white space, matches its row's `pattern`, else 0.

    Raises:
      TaskError: a pattern that is no regular expression.
    """
    rewards = []
    for text, one in zip(completions, pattern, strict=True):
        try:
            rewards.append(float(re.fullmatch(one, text_of(text).strip()) is not None))
        except re.error as error:
            raise TaskError(f"the pattern {one!r} is no regular expression ({error})") from None
    return rewards


def plain(text: str) -> str:
    """A text as it is compared."""
    return " ".join(str(text).split()).removesuffix(".").rstrip().casefold()
