"""Unit tests of generated Python, run in a sandbox of the kernel's (`sandbox`): columns `tests` and perhaps `seconds`.

`tests` is Python: a text, in which each `assert` at its top level is a test and all else prepares them (a text without
such an `assert` is one test), or a list of texts, each of them a test. A completion's code is its last fenced block, or
all of it where it has none. Importing this module runs a program in the sandbox, so that a machine that cannot make one
is refused before a run begins.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

from mara_jax.tasks.base import Prompt, TaskError, text_of
from mara_jax.tasks.rewards import sandbox

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.I)
_Tests = str | Sequence[str]


def all_passed(
    completions: Sequence[Prompt], tests: Sequence[_Tests], seconds: Sequence[float] | None = None
) -> dict[str, list[float]]:
    """1 where a completion's code passes every test, else 0; with what is counted, a column each."""
    return _judged(completions, tests, seconds, lambda passed: float(all(passed)))


def share_passed(
    completions: Sequence[Prompt], tests: Sequence[_Tests], seconds: Sequence[float] | None = None
) -> dict[str, list[float]]:
    """The share of the tests that a completion's code passes; with what is counted, a column each."""
    return _judged(completions, tests, seconds, lambda passed: sum(passed) / len(passed))


def program(completion: Prompt) -> str | None:
    """An answer function: the code without comments and in one layout; None where it is no Python."""
    try:
        return ast.unparse(ast.parse(code_of(completion))).strip() or None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def code_of(completion: Prompt) -> str:
    """The last fenced block of a completion, or all of it."""
    text = text_of(completion)
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def parts(tests: _Tests) -> list[tuple[str, bool]]:
    """The statements of tests in order, and which of them count.

    Raises:
      TaskError: they are no Python, or there are none.
    """
    sources = [tests] if isinstance(tests, str) else tests
    texts = isinstance(sources, list | tuple) and all(isinstance(source, str) and source.strip() for source in sources)
    if not texts or not sources:
        raise TaskError(f"'tests' is {tests!r:.80}: give Python as a text, or a list of such texts")
    try:
        trees = [ast.parse(source) for source in sources]
    except (SyntaxError, ValueError) as error:
        raise TaskError(f"'tests' is no Python ({error}): {tests!r:.80}") from None
    statements = trees[0].body if isinstance(tests, str) else []
    if not any(isinstance(statement, ast.Assert) for statement in statements):
        return [(source, True) for source in sources]
    return [(ast.unparse(statement), isinstance(statement, ast.Assert)) for statement in statements]


def _judged(completions: Sequence[Prompt], tests: Any, seconds: Any, reward: Any) -> dict[str, list[float]]:
    """Rewards, and for each way to end but "passed" and "failed" where it happened."""
    verdicts = []
    for row, completion in enumerate(completions):
        limits = sandbox.Limits() if seconds is None else sandbox.Limits(seconds=float(seconds[row]))
        verdicts.append(sandbox.run(code_of(completion), parts(tests[row]), limits))
    counted = {
        outcome: [float(verdict.outcome == outcome) for verdict in verdicts]
        for outcome in sandbox.OUTCOMES
        if outcome not in ("passed", "failed")
    }
    return {"reward": [reward(verdict.passed) for verdict in verdicts], **counted}


sandbox.check()
