"""Answers compared as mathematics: values by hand, one spelling each, and input on which the package hangs."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from mara_jax.tasks import TaskError, prompts
from mara_jax.tasks.checked import checked

pytest.importorskip("math_verify")

from mara_jax.tasks.rewards import mathematics

HANGS = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"


@pytest.mark.parametrize(
    ("solution", "completion", "equal"),
    [
        ("7", "3 + 4 = 7, so the answer is 7.", True),
        ("7", "The final answer is $x = 7$.", True),
        ("7", r"\boxed{8}, not 7", False),
        ("7", "I do not know.", False),
        ("7", "", False),
        (7, "7.0", True),
        ("1/2", r"\boxed{\frac{2}{4}}", True),
        (r"\frac{1}{2}", "0.5", True),
        ("2x+1", "$1 + 2x$", True),
        ("$x^2 + x$", r"\boxed{x(x+1)}", True),
        (r"\{1, 2\}", r"$\{2, 1\}$", True),
        ("(1, 2)", "$(2, 1)$", False),
        (r"\text{even}", r"\boxed{\text{even}}", True),
        ("7", [{"role": "assistant", "content": r"\boxed{7}"}], True),
    ],
)
def test_answers_are_compared_as_mathematics(solution, completion, equal):
    assert mathematics.correct([completion], [solution]) == [float(equal)]


@pytest.mark.parametrize(
    ("completions", "spelling"),
    [
        (["7", "x = $7$", "7.0", r"\boxed{\frac{14}{2}}", "$x=7$"], "7"),
        (["0.5", r"$\frac{2}{4}$", "1/2", r"50\% or $50\%$"], "1/2"),
        ([r"$x(x+1)$", r"\boxed{x + x^2}"], "x**2 + x"),
        ([r"$\sqrt{8}$", r"$2\sqrt{2}$"], "2.82842712475"),
        ([r"$\{2, 1\}$", r"$\{1, 2\}$"], "{1, 2}"),
        (["I do not know.", ""], None),
    ],
)
def test_equal_answers_have_one_spelling(completions, spelling):
    assert [mathematics.answer(text) for text in completions] == [spelling] * len(completions)


def test_input_on_which_the_package_hangs_is_an_error_in_time(monkeypatch):
    monkeypatch.setattr(mathematics, "SECONDS", 1)
    started = time.monotonic()
    first, second = mathematics.correct([HANGS, "7"], ["7", "7"])
    assert isinstance(first, TaskError) and str(first) == "math-verify did not compare it within 1 s" and second == 1
    with pytest.raises(TaskError, match=r"did not read the answer within 1 s"):
        mathematics.answer(HANGS)
    assert time.monotonic() - started < 10


def task(tmp_path, **fields):
    rows = [{"prompt": "3 + 4?", "solution": "7"}, {"prompt": "None?", "solution": "$$"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = f"{mathematics.__name__}:correct"
    return checked(prompts.make(prompts.Config(prompts=str(tmp_path / "rows.jsonl"), reward=reward, **fields)))


def test_a_run_goes_on_after_a_worker_that_hangs(tmp_path):
    """The limit of the worker is the shorter one: its process is killed and started again."""
    one = task(tmp_path, failure="value", failure_value=-1.0, time_limit=1.0)
    pid = one.task.calls.workers[0].process.pid
    score = one.score([0, 0], ["7", HANGS], [True, True])
    assert np.asarray(score.reward).tolist() == [1, -1]
    assert np.asarray(score.columns["failed"]).tolist() == [0, 1]
    assert one.task.calls.workers[0].process.pid != pid
    assert np.asarray(one.score([0], ["7"], [True]).reward).tolist() == [1]


def test_a_solution_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"reads no value in the solution '\$\$': give the answer alone, as .*line 2"):
        task(tmp_path).score([1], ["7"], [True])


@pytest.mark.slow
def test_a_run_that_stops_names_row_and_completion(tmp_path):
    one = task(tmp_path)
    with pytest.raises(ValueError) as caught:
        one.score([0, 0], ["7", HANGS], [True, True])
    for words in (
        "mathematics:correct: math-verify did not compare it within 3 s",
        "rows.jsonl, line 1",
        r"\\dfrac{5^",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    """Of a worker whose Python has no such package."""
    program = f"""
import sys
sys.modules["math_verify"] = None
from mara_jax.tasks import functions
functions.find("{mathematics.__name__}:correct")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "TaskError: math-verify is not installed" in last and last.endswith('pip install "mara_jax[math]"')


@pytest.mark.slow
def test_a_whole_run_goes_on_after_input_on_which_the_package_hangs(command, tmp_path):
    """A reward that meets it at one of two prompts: it is counted, and the run ends well; else it stops with a line."""
    rows = [{"prompt": f"3 + {n}?", "solution": 3 + n, "completion": "7"} for n in (4, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(f"""
from mara_jax.tasks.rewards import mathematics
HANGS = {HANGS!r}

def reward(completions, solution):
    return mathematics.correct([HANGS if wanted == 7 else "8" for wanted in solution], solution)

def answer(completion):
    return mathematics.answer(completion)
""")
    flags = [
        "mara_jax.main", "--config=configs/prompts.py:nano", f"--config.task.prompts={tmp_path}/rows.jsonl",
        f"--config.task.reward={tmp_path}/own.py:reward", f"--config.task.answer={tmp_path}/own.py:answer",
        "--config.warmup.steps=2", "--config.steps=2", "--config.rollout.prompts_per_step=2",
        "--config.rollout.group_size=2", "--config.task.truncated=score", "--config.reference.samples=2",
    ]  # fmt: skip
    done = command(*flags, f"--workdir={tmp_path}/run", "--config.task.failure=value", "--config.task.time_limit=2")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["task/failed"] == row["reward/mean"] == 0.5 for row in rows), rows
    done = command(*flags, f"--workdir={tmp_path}/stopped", "--config.algorithm.method=vanilla")
    assert done.returncode == 2 and "math-verify did not compare it within 3 s" in done.stderr
    assert "rows.jsonl, line " in done.stderr and "Traceback" not in done.stderr
