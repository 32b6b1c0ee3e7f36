"""Prompt files with functions of the user's own: values by hand, and every way in which a function can fail."""

import json
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from mara_jax.tasks import Score, prompts
from mara_jax.tasks.base import Context
from mara_jax.tasks.calls import _parts
from mara_jax.tasks.checked import checked
from mara_jax.tasks.worker import Worker, WorkerError

FUNCTIONS = '''
import os, time

def solved(prompts, completions, solution):
    """1 for the solution of the row."""
    return [float(text == wanted) for text, wanted in zip(completions, solution)]

def short(completions, limit=3, **columns):
    return {"reward": [None if text == "skip" else len(text) <= limit for text in completions],
            "letters": [len(text) for text in completions]}

def unsure(prompts, completions):
    return [None] * len(completions)

def group(prompts, completions):
    """How many completions of the call equal each."""
    return [completions.count(text) for text in completions]

def answer(prompt, completion, solution):
    return f"{solution}:{completion}" if completion != "none" else None

def number(prompt, completion):
    return len(completion)

class Unknown(Exception):
    """The run does not have this class."""

def behaves(prompts, completions):
    """Does what the completion says."""
    rewards = []
    for text in completions:
        if text == "two" and len(completions) > 1: raise ValueError("only in company")
        if text == "raise": raise RuntimeError("two\\nlines")
        if text == "hang": time.sleep(1000)
        if text == "exit": os._exit(3)
        if text == "sys.exit": raise SystemExit(1)
        if text == "kill": os.kill(os.getpid(), 9)
        rewards.append({"nan": float("nan"), "text": "1.0", "none": None, "list": [1], "big": 10**400,
                        "error": Unknown("of its own"), "set": {Unknown()}}.get(text, 1))
    return rewards[1:] if "short" in completions else None if "nothing" in completions else rewards

def timed(completions, step, ref_logp):
    return [step * 100 + value for value in ref_logp]

async def later(completions):
    return [1] * len(completions)

def huge(completions):
    return [1e30] * len(completions)

def process(prompts, completions):
    return [os.getpid()] * len(completions)
'''
ROWS = [{"prompt": "a?", "solution": "a"}, {"prompt": "b?", "solution": "b"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("user")
    (where / "own.py").write_text(FUNCTIONS)
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return where


def task(folder, reward, **fields):
    names = ",".join(f"{folder}/own.py:{name}" for name in reward.split(","))
    if "answer" in fields:
        fields["answer"] = f"{folder}/own.py:{fields['answer']}"
    return checked(prompts.make(prompts.Config(prompts=str(folder / "rows.jsonl"), reward=names, **fields)))


def scored(one, texts, index=None, finished=None) -> Score:
    return one.score(index or [0] * len(texts), texts, finished or [True] * len(texts))


def test_a_reward_and_an_answer_by_hand(folder):
    one = task(folder, "solved", answer="answer")
    assert [one.prompt(0), one.prompt(1), len(one)] == ["a?", "b?", 2]
    score = scored(one, ["a", "a", "none"], [0, 1, 1])
    assert np.asarray(score.reward).tolist() == [1, 0, 0] and score.answer == ["a:a", "b:a", None]


def test_a_run_knows_what_it_depends_on(folder):
    one = task(folder, "solved")
    assert one.files() == [str(folder / "rows.jsonl")] and one.code_files() == [str(folder / "own.py")]


def test_demonstrations_may_have_a_file_of_their_own(folder, tmp_path):
    rows = [{"prompt": "a?", "completion": "a"}, {"prompt": "c?", "completion": ["c", "d"]}, {"prompt": "e?"}]
    shown = tmp_path / "shown.jsonl"
    shown.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = task(folder, "solved", demonstrations=str(shown))
    assert set(one.demonstrations(0, 0, 64)) == {("a?", "a"), ("c?", "c"), ("c?", "d")} and len(one) == 2
    assert one.files() == [str(folder / "rows.jsonl"), str(shown)]
    lacking = task(folder, "solved", demonstrations=str(folder / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"rows\.jsonl has no column 'completion': task\.demonstrations needs it"):
        lacking.demonstrations(0, 0, 1)
    assert task(folder, "solved").demonstrations(0, 0, 1) == []


def test_several_rewards_are_weighted_and_none_is_no_judgement(folder):
    one = task(folder, "solved,short", reward_weights="2,.5")
    score = scored(one, ["a", "long", "skip"])
    assert np.asarray(score.reward).tolist() == [2.5, 0, 0]
    assert {name: np.asarray(column).tolist() for name, column in score.columns.items()} == {
        "failed": [0, 0, 0],
        "solved": [1, 0, 0],
        "short": [1, 0, 0],
        "letters": [1, 4, 4],
    }
    assert score.answer == ["a", "long", "skip"]  # without an answer function its text


def test_truncated_completions_have_no_reward_where_the_config_says_so(folder):
    for truncated, reward, answer in (
        ("score", [1, 1], ["a", "a"]),
        ("zero", [1, 0], ["a", None]),
        ("mask", [1, 0], ["a", None]),
    ):
        score = scored(task(folder, "solved", truncated=truncated), ["a", "a"], finished=[True, False])
        assert (np.asarray(score.reward).tolist(), score.answer) == (reward, answer)
    assert [task(folder, "solved", truncated=one).leaves_out_truncated for one in prompts.TRUNCATED] == [
        False,
        False,
        True,
    ]


def test_a_reward_can_read_the_step_and_the_log_probs_of_the_reference(folder):
    one = task(folder, "timed")
    assert one.reads_ref_logp and not task(folder, "solved").reads_ref_logp
    score = one.score_in_run([0, 1, 0], ["a", "b", "c"], [True] * 3, Context(7, [-1.0, -2.5, -3.0]))
    assert np.asarray(score.reward).tolist() == [699, 697.5, 697]
    with pytest.raises(ValueError, match="timed reads ref_logp, which is known in training alone"):
        scored(one, ["a"])


def test_columns_that_the_run_gives_are_refused(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a?", "step": 3}\n')
    with pytest.raises(ValueError, match=r"has a column 'step', which rewards have from the run: rename it"):
        prompts.make(prompts.Config(prompts=str(tmp_path / "rows.jsonl"), reward=f"{folder}/own.py:short"))


FAILURES = [
    ("raise", "behaves failed: RuntimeError: two lines ("),
    ("hang", "behaves did not return within 1 s"),
    ("exit", "behaves: its process ended with status 3"),
    ("kill", "behaves: its process ended by signal SIGKILL"),
    ("sys.exit", "behaves failed: SystemExit: 1 ("),
    ("nan", "behaves returned nan: return finite numbers, or None"),
    ("text", "behaves returned '1.0': return finite numbers"),
    ("list", "behaves returned [1]: return finite numbers"),
    ("big", "return finite numbers"),
    ("error", "behaves: Unknown: of its own ("),
    ("set", "behaves returned what cannot be read here ("),
    ("none", "behaves returned None: at least one function must judge each completion"),
    ("short", "behaves returned 1 values of 'reward' for 2 completions"),
    ("nothing", "behaves returned 'reward' None: return a list of 2 numbers"),
    ("two", "behaves failed: ValueError: only in company ("),
]


@pytest.fixture(scope="module")
def behaves(folder):
    """By what a failure does: stop the run, or give a value."""
    return {
        failure: task(folder, "behaves", failure=failure, failure_value=-2.0, time_limit=1.0)
        for failure in prompts.FAILURE
    }


@pytest.mark.parametrize(("text", "words"), FAILURES)
def test_a_failure_stops_the_run_and_names_the_completion(behaves, text, words):
    with pytest.raises(ValueError) as caught:
        scored(behaves["stop"], ["good", text], [0, 1])
    message = str(caught.value)
    # What a call of both says of neither belongs to the first.
    place = "line 1, completion 'good'" if text in ("short", "nothing", "two") else f"line 2, completion {text!r}"
    assert words in message and f"rows.jsonl, {place}" in message and "\n" not in message
    assert "set task.failure=value" in message


def test_a_failure_can_be_a_value(behaves):
    texts = ["good", "nan", "good", "raise", "kill", "good"]
    score = scored(behaves["value"], texts, [0, 0, 0, 1, 1, 1])
    assert np.asarray(score.reward).tolist() == [1, -2, 1, -2, -2, 1]
    assert score.answer == ["good", None, "good", None, None, "good"]
    assert np.asarray(score.columns["failed"]).tolist() == [0, 1, 0, 1, 1, 0]


def test_answers_must_be_texts(folder):
    with pytest.raises(
        ValueError, match=r"own.py:number returned 1: return a text, or None \(.*line 1, completion 'a'"
    ):
        scored(task(folder, "solved", answer="number"), ["a"])


def test_a_call_has_whole_groups_and_workers_share_them(folder):
    assert _parts([0, 0, 0, 0, 1, 1, 2], 2) == [[0, 1, 2, 3], [4, 5, 6]]
    assert _parts([0, 0, 0], 3) == [[0, 1, 2]]
    assert _parts([0, 1, 2, 3], 2) == [[0, 1], [2, 3]]
    one = task(folder, "group,process", workers=2)
    score = scored(one, ["x", "x", "y", "x"], [0, 0, 1, 1])
    processes = np.asarray(score.columns["process"]).tolist()
    assert np.asarray(score.columns["group"]).tolist() == [2, 2, 1, 1]
    assert processes[0] == processes[1] != processes[2] == processes[3]


def test_demonstrations_are_rows_with_a_completion(tmp_path, folder):
    rows = [{"prompt": "a?", "completion": "a", "solution": "a"}, {"prompt": "b?", "solution": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"reward": f"{folder}/own.py:solved"}
    one = prompts.make(prompts.Config(prompts=str(tmp_path / "rows.jsonl"), **names))
    assert one.demonstrations(0, 0, 5) == [("a?", "a")] * 5
    assert prompts.make(prompts.Config(prompts=str(folder / "rows.jsonl"), **names)).demonstrations(0, 0, 5) == []
    rows[0]["completion"] = ["x", "y", "y", "y"]  # drawn as often as they are written
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = prompts.make(prompts.Config(prompts=str(tmp_path / "rows.jsonl"), **names))
    share = np.mean([text == "y" for _, text in one.demonstrations(0, 0, 2000)])
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    assert one.demonstrations(3, 1, 20) == one.demonstrations(3, 1, 20) != one.demonstrations(3, 2, 20)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompts": ""}, "task.prompts is empty: set --config.task.prompts=prompts.jsonl"),
        ({"reward": ""}, "task.reward is empty: set --config.task.reward=rewards.py:correct"),
        ({"reward": "nowhere.py:f"}, "nowhere.py does not exist; give FILE.py:FUNCTION"),
        ({"reward": "own.py"}, "'own.py' names no function: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"),
        ({"reward": "own.py:nothing"}, "has no function 'nothing'; it has solved, short"),
        (
            {"reward": "own.py:answer"},
            "wants the argument 'prompt'; it can have prompts, completions, step, ref_logp and the columns",
        ),
        ({"reward": "no_such_package.rewards:f"}, "cannot be imported: ModuleNotFoundError"),
        ({"reward": "broken.py:f"}, "broken.py, line 2: '(' was never closed: 'def f('"),
        ({"reward": "fails.py:f"}, "fails.py cannot be imported: ZeroDivisionError: division by zero ("),
        ({"reward_weights": "1,2"}, "names 1 functions and task.reward_weights 2 weights"),
        ({"reward_weights": "much"}, "task.reward_weights='much' are no numbers"),
    ],
)
def test_settings_that_cannot_be_are_one_line(folder, monkeypatch, fields, words):
    monkeypatch.chdir(folder)
    (folder / "broken.py").write_text("x = 1\ndef f(\n")
    (folder / "fails.py").write_text("1 / 0\n")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prompts.make(prompts.Config(**{"prompts": "rows.jsonl", "reward": "own.py:solved"} | fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_worker_that_hangs_ends_with_its_parent(folder):
    """Its parent is killed, and so has no chance to end it."""
    program = f"""
        from mara_jax.tasks.worker import Worker
        worker = Worker(["{folder}/own.py:behaves"], 60.0, 8.0)
        worker.send("reward", "{folder}/own.py:behaves", {{"prompts": [""], "completions": ["hang"]}}, 1)
        print(worker.process.pid, flush=True)
        worker.result()
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    os.kill(number, 0)  # alive
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{number}") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{number}")


def test_a_worker_goes_on_after_a_failure(folder):
    name = f"{folder}/own.py:behaves"
    worker = Worker([name], 1.0, 8.0)
    for text, worked in (("kill", False), ("fine", True), ("hang", False), ("fine", True)):
        worker.send("reward", name, {"prompts": [""], "completions": [text]}, 1)
        if worked:
            assert worker.result() == ([1], {})
        else:
            with pytest.raises(WorkerError):
                worker.result()
    worker.close()


def test_a_run_that_stops_asks_for_no_completion_behind_one_that_fails(folder):
    """Five completions hang for a second each: the call, then the second by itself, after the first."""
    one, began = task(folder, "behaves", time_limit=1.0), time.monotonic()
    with pytest.raises(ValueError, match=r"did not return within 1 s .*completion 'hang'"):
        scored(one, ["good", *["hang"] * 9])
    assert time.monotonic() - began < 8  # and two starts of the process


def test_async_functions_are_refused(folder):
    with pytest.raises(ValueError, match=r"own.py:later is async, and nothing awaits it: write an ordinary function"):
        task(folder, "later")


def test_rewards_beyond_float32s_squares_are_refused(folder):
    with pytest.raises(ValueError, match=r"huge returned 1e\+30: return numbers of at most 1e\+06 in size"):
        scored(task(folder, "huge"), ["a"])


def test_rows_without_a_column_that_a_function_needs_are_refused(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a?", "solution": "a"}\n{"prompt": "b?"}\n{"prompt": "c?", "solution": null}\n')
    with pytest.raises(ValueError, match=r"line 2: it has no 'solution', which .*own.py:solved wants, as 1 of 3 rows"):
        prompts.make(prompts.Config(prompts=str(rows), reward=f"{folder}/own.py:solved"))
    prompts.make(prompts.Config(prompts=str(rows), reward=f"{folder}/own.py:short"))  # takes what there is
