"""Mathematical answers, compared as mathematics by the package `math-verify`: a column `solution`, the answer alone.

A solution is LaTeX or a number ("\\frac{1}{2}", "1/2", "$x = 3$"). A completion's answer is what math-verify finds in
it: the last `\\boxed{...}`, else what follows "the final answer is", else the last formula or number.
"""

import functools
from collections.abc import Sequence
from typing import Any

from mara_jax.tasks.base import Prompt, TaskError, text_of

try:
    import math_verify
    import sympy
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout
except ImportError as error:
    raise TaskError(f'math-verify is not installed ({error}): pip install "mara_jax[math]"') from None

SECONDS = 3  # of each: reading a completion, comparing it, writing its answer in one spelling
_DIGITS = 12  # of an answer that is no fraction
_LONGEST = 40  # characters of a fraction that is written exactly
_MARKED = ("$", "\\boxed", "\\(", "\\[")


def correct(completions: Sequence[Prompt], solution: Sequence[Any]) -> list[float | TaskError]:
    """1 where a completion's answer equals its row's `solution`, else 0; an error where that cannot be told."""
    return [_correct(text_of(text), str(wanted)) for text, wanted in zip(completions, solution, strict=True)]


def answer(completion: Prompt) -> str | None:
    """An answer function: the value of a completion's answer in one spelling, None where it has none.

    Raises:
      TaskError: that takes longer than SECONDS.
    """
    try:
        values = _values(text_of(completion))
        value = next((value for value in values if not isinstance(value, str)), None)
        return None if value is None else timeout(SECONDS)(spelt)(value)
    except TimeoutException:
        raise TaskError(f"math-verify and sympy did not read the answer within {SECONDS} s") from None


def spelt(value: Any) -> str:
    """A value of sympy as text: x = 7, 7.0 and 14/2 are "7"; a number that is no short fraction has twelve digits."""
    if isinstance(value, sympy.Eq) and value.lhs.is_Symbol:
        value = value.rhs
    if not isinstance(value, sympy.Expr):
        return str(value)
    value = sympy.nsimplify(value.doit(), rational=True)
    if not value.is_number:
        return str(sympy.expand(value))
    exact = str(value) if value.is_Rational and abs(value) < 10**_LONGEST else ""
    return exact if 0 < len(exact) <= _LONGEST else str(sympy.N(value, _DIGITS))


def _correct(text: str, solution: str) -> float | TaskError:
    try:
        wanted = _solution(solution)
        given = _values(text)
    except TimeoutException:
        return TaskError(f"math-verify did not read it within {SECONDS} s")
    if not wanted:
        return TaskError(
            f"math-verify reads no value in the solution {solution!r:.60}: give the answer alone, as LaTeX"
        )
    late = False
    for reference in wanted:
        for value in given:
            try:
                if math_verify.verify(reference, value, timeout_seconds=SECONDS, raise_on_error=True):
                    return 1.0
            except MemoryError:
                raise
            except TimeoutException:
                late = True
            except Exception:  # the two cannot be compared, a set with a matrix for example
                continue
    return TaskError(f"math-verify did not compare it within {SECONDS} s") if late else 0.0


@functools.lru_cache(maxsize=1024)
def _solution(text: str) -> list[Any]:
    """What a solution is; it is read as a formula, unless it marks one."""
    return _values(text if any(mark in text for mark in _MARKED) else f"${text}$")


def _values(text: str) -> list[Any]:
    """The value that math-verify finds, and its text; none where it finds none."""
    try:
        return math_verify.parse(text, parsing_timeout=SECONDS, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # what looked like a formula is none
        return []
