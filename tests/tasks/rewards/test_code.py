"""Unit tests of generated Python: which part of a completion is code, what counts as a test, rewards by hand."""

import json

import numpy as np
import pytest

from mara_jax.tasks import TaskError, prompts
from mara_jax.tasks.checked import checked

try:
    from mara_jax.tasks.rewards import code
except TaskError as refusal:
    pytest.skip(str(refusal), allow_module_level=True)

DOUBLE = "Here it is:\n```python\ndef double(x):\n    return 2 * x  # twice\n```\nDone."
TESTS = "import math\nassert double(2) == 4\nassert double(-1) == -2\nassert math.isnan(double(math.nan))"
KINDS = ("raised", "ended", "out_of_time", "out_of_memory", "forbidden")


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("First\n```\nx = 1\n```\nno:\n```Python\nx = 2\n```\n", "x = 2\n"),
        ("  ```py\n  x = 1\n  ```", "  x = 1\n"),
        ([{"role": "assistant", "content": "```\nx = 1\n```"}], "x = 1\n"),
        ("```python\nx = 1", "```python\nx = 1"),  # cut in its midst: no Python
    ],
)
def test_the_code_of_a_completion(completion, found):
    assert code.code_of(completion) == found


@pytest.mark.parametrize(
    ("tests", "parts"),
    [
        ("assert f(1)", [("assert f(1)", True)]),
        ("a = 1\nassert f(a)\nassert f(2), 2", [("a = 1", False), ("assert f(a)", True), ("assert f(2), 2", True)]),
        ("def check(g):\n    assert g(1)\ncheck(f)", [("def check(g):\n    assert g(1)\ncheck(f)", True)]),
        (["assert f(1)", "a = 2\nassert f(a)"], [("assert f(1)", True), ("a = 2\nassert f(a)", True)]),
    ],
)  # fmt: skip
def test_what_counts_as_a_test(tests, parts):
    assert code.parts(tests) == parts


@pytest.mark.parametrize("tests", [None, "", [], 3, ["assert f(1)", " "], "assert f(", "\0"])
def test_tests_that_are_none_are_one_line(tests):
    with pytest.raises(TaskError, match=r"^'tests' is .*") as caught:
        code.parts(tests)
    assert "\n" not in str(caught.value)


def test_rewards_by_hand():
    wrong = "def double(x): return 4"
    completions = [DOUBLE, wrong, "import os; os.fork()", "1 / 0"]
    rewards = code.share_passed(completions, [TESTS] * 4)
    assert rewards == {
        "reward": [1, pytest.approx(1 / 3), 0, 0],
        **dict.fromkeys(KINDS, [0.0] * 4),
        "forbidden": [0, 0, 1, 0],
        "raised": [0, 0, 0, 1],
    }
    assert code.all_passed(completions[:2], [TESTS] * 2)["reward"] == [1, 0]


def test_seconds_are_a_column():
    slow = "import time; time.sleep(.3)\ndef double(x): return 2 * x"
    rewards = code.all_passed([slow] * 2, ["assert double(1) == 2"] * 2, [9, 0.1])
    assert rewards["reward"] == [1, 0] and rewards["out_of_time"] == [0, 1]


def test_answers_are_programs_without_layout():
    other = "def double( x ):\n\n  return (2*x)"
    assert code.program(DOUBLE) == code.program(other) == "def double(x):\n    return 2 * x"
    assert code.program("no Python") is None and code.program("") is None and code.program("(" * 1000) is None


def test_a_task_counts_what_was_contained(tmp_path):
    """In the worker of a run; a row whose tests are none is named."""
    rows = [{"prompt": "Write double.", "tests": TESTS}, {"prompt": "Write half.", "tests": "assert half(2) =="}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"reward": f"{code.__name__}:share_passed", "answer": f"{code.__name__}:program"}
    task = checked(prompts.make(prompts.Config(prompts=str(tmp_path / "rows.jsonl"), **names)))
    score = task.score([0, 0], [DOUBLE, "import socket; socket.socket()"], [True, True])
    assert np.asarray(score.reward).tolist() == [1, 0]
    assert score.answer == ["def double(x):\n    return 2 * x", "import socket\nsocket.socket()"]
    assert {name: np.asarray(column).tolist() for name, column in score.columns.items()} == {
        "failed": [0, 0],
        **{kind: [0, 0] for kind in KINDS},
        "forbidden": [0, 1],
    }
    with pytest.raises(ValueError, match=r"'tests' is no Python \(invalid syntax .*rows.jsonl, line 2, completion"):
        task.score([1], [DOUBLE], [True])
