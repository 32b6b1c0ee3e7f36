"""A task's values: one that breaks the promises of `Task` is one line with the method, the prompt and the value."""

from decimal import Decimal

import numpy as np
import pytest

from mara_jax.tasks.base import Score, Task
from mara_jax.tasks.checked import CheckedTask, checked

NAN = float("nan")


class Fixed(Task):
    """Two prompts; prompt 1 has the answers "a" and "b". Methods return, or raise, what the test gives."""

    max_reward, invalid_reward = 1.0, 0.0

    def __init__(self, **values) -> None:
        self.values = values

    def _value(self, name, default):
        value = self.values.get(name, default)
        return value() if callable(value) else value

    def __len__(self) -> int:
        return self._value("len", 2)

    def prompt(self, index):
        return self._value("prompt", "?")

    def answer_set(self, index):
        return self._value("answer_set", ("a", "b") if index else None)

    def score(self, prompt_index, texts, finished):
        return self._value("score", None)

    def demonstrations(self, seed, step, batch):
        return self._value("demonstrations", [])

    def accepts_warm_up(self, answers):
        return self._value("accepts_warm_up", (True, "good"))


def score(verdict) -> Score:
    return checked(Fixed(score=verdict)).score([0, 1], ["x", "y"], [True, True])


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Score([1.0], ["a", None]), "'reward' of shape (1,) for 2 completions"),
        (Score([[1.0, 0.0]], ["a", None]), "'reward' of shape (1, 2) for 2 completions"),  # pyright: ignore
        (Score(1.0, ["a", None]), "'reward' of shape () for 2 completions"),  # pyright: ignore
        (Score([[1.0], [0.0, 1.0]], ["a", None]), "'reward' that are no list of numbers"),  # pyright: ignore
        (Score({0: 1.0, 1: 0.0}, ["a", None]), "'reward' of shape () for 2"),  # pyright: ignore
        (Score([1.0, 0.0], ["a"]), "1 answers for 2 completions"),
        (Score([1.0, 0.0], "ab"), "returned answers 'ab': return a list of texts"),
        (Score([1.0, 1.0], {"a", "b"}), "return a list of texts"),  # pyright: ignore
        (Score([1.0, 1.0], None), "returned answers None: return a list of texts"),  # pyright: ignore
        (Score([1.0, 0.0], ["a", 3]), "the answer 3 to prompt 1: return a text, or None"),  # pyright: ignore
        (Score([1.0, 0.0], ["a", NAN]), "the answer nan to prompt 1: return a text, or None"),  # pyright: ignore
        (Score([1.0, 0.0], ["z", "c"]), "the answer 'c' to prompt 1, whose answer set lacks it"),
        (Score([0.0, NAN], [None, None]), "'reward' nan for a completion of prompt 1: return finite numbers"),
        (Score([float("inf"), 0.0], [None, None]), "'reward' inf for a completion of prompt 0"),
        (Score([1e39, 0.0], ["a", None]), "'reward' 1e+39 for a completion of prompt 0"),  # infinite in float32
        (Score([10**400, 0.0], ["a", None]), "for a completion of prompt 0: return finite numbers"),
        (Score([0.0, None], [None, None]), "'reward' None for a completion of prompt 1"),  # pyright: ignore
        (Score(["1.0", 1.0], ["a", "a"]), "'reward' '1.0' for a completion of prompt 0"),  # pyright: ignore
        (Score([1j, 1.0], ["a", "a"]), "'reward' 1j for a completion of prompt 0"),  # pyright: ignore
        (Score([1.0, 2.0], ["a", "a"]), "'reward' 2 for a completion of prompt 1, above its max_reward=1"),
        (Score([1.0, 0.5], ["a", None]), "'reward' 0.5 for a completion of prompt 1 without an answer, but its inv"),
        (Score([1.0, 0.0], ["a", None], {"votes": [1, 2, 3]}), "'votes' of shape (3,)"),
        (Score([1.0, 0.0], ["a", None], {"votes": [1, NAN]}), "'votes' nan for a completion of prompt 1"),
        (Score([1.0, 0.0], ["a", None], [[1, 2]]), "returned columns=[[1, 2]]"),  # pyright: ignore
        (([1.0], ["a"]), "returned ([1.0], ['a']) instead of a mara_jax.tasks.Score"),
        (None, "returned None instead of a mara_jax.tasks.Score"),
    ],
)
def test_scores_that_do_not_fit_are_named(verdict, words):
    with pytest.raises(ValueError) as caught:
        score(verdict)
    assert words in str(caught.value) and str(caught.value).startswith("the task 'task', score: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reward", "answer"),
    [
        ([1, 0], ["a", None]),
        ([True, False], ("a", None)),
        (np.array([1.0 + 1e-7, -0.0]), np.array(["a", None], object)),
        ([Decimal("1.0"), np.float64(0)], [np.str_("a"), None]),
    ],
)
def test_numbers_and_texts_of_any_kind_pass(reward, answer):
    verdict = score(Score(reward, answer, {"votes": np.array([1, 2])}))
    assert np.asarray(verdict.reward).tolist() == pytest.approx([1, 0]) and verdict.answer == ["a", None]
    assert [type(answer) for answer in verdict.answer] == [str, type(None)]
    assert np.asarray(verdict.columns["votes"]).tolist() == [1, 2]


def test_a_column_may_be_called_reward():
    verdict = score(Score([1.0, 0.0], ["a", None], {"reward": [5, 6]}))
    assert np.asarray(verdict.reward).tolist() == [1, 0] and np.asarray(verdict.columns["reward"]).tolist() == [5, 6]


@pytest.mark.parametrize(
    ("name", "value", "call", "words"),
    [
        ("prompt", 7, lambda task: task.prompt(1), "prompt(1): returned 7: return a text, or a list of chat messages"),
        ("prompt", [], lambda task: task.prompt(1), "prompt(1): returned []: return a text"),
        ("prompt", [{"role": "user"}], lambda task: task.prompt(1), "returned [{'role': 'user'}]"),
        ("prompt", lambda: {}["x"], lambda task: task.prompt(1), "prompt(1): failed: KeyError: 'x' ("),
        ("len", 2.5, len, "__len__(): failed: TypeError"),
        ("answer_set", "abc", lambda task: task.answer_set(1), "answer_set(1): returned 'abc': return a tuple of"),
        ("answer_set", ("a", "a"), lambda task: task.answer_set(1), "different texts"),
        ("answer_set", (), lambda task: task.answer_set(1), "None where they are not known"),
        ("answer_set", [1, 2], lambda task: task.answer_set(0), "answer_set(0): returned [1, 2]"),
        ("demonstrations", ["ab"], lambda task: task.demonstrations(0, 0, 1), "returned 'ab': each is a pair"),
        ("demonstrations", [("a", None)], lambda task: task.demonstrations(0, 0, 1), "returned ('a', None)"),
        ("demonstrations", [("a", "b")], lambda task: task.demonstrations(0, 5, 2), "(0, 5, 2): returned 1 pairs"),
        ("demonstrations", None, lambda task: task.demonstrations(0, 0, 1), "failed: TypeError"),
        ("accepts_warm_up", True, lambda task: task.accepts_warm_up([]), "returned True: return True or False, and"),
    ],
)
def test_other_values_that_do_not_fit_are_named(name, value, call, words):
    with pytest.raises(ValueError) as caught:
        call(checked(Fixed(**{name: value})))
    assert words in str(caught.value) and "the task 'task', " in str(caught.value)


def test_limits_must_be_numbers():
    task = Fixed()
    task.max_reward = "high"  # pyright: ignore
    with pytest.raises(ValueError, match="the task 'task', max_reward: is 'high': give a finite number"):
        checked(task)


class Parses(Fixed):
    """Fails at a completion that is no number."""

    def score(self, prompt_index, texts, finished):
        return Score([float(int(text) > 0) for text in texts], ["a"] * len(texts))


def test_a_task_that_fails_to_score_names_the_completion_and_the_place():
    with pytest.raises(ValueError) as caught:
        checked(Parses()).score([0, 1, 1], ["1", "seven\n", "2"], [True] * 3)
    message = str(caught.value)
    assert "score of the completion 'seven\\n' of prompt 1: failed: ValueError: invalid literal for int()" in message
    assert f"({__file__}, line " in message and "\n" not in message


def test_a_failure_of_the_whole_batch_is_named_without_a_completion():
    calls = []

    def fails_once():
        calls.append(1)
        return 1 / 0 if len(calls) == 1 else Score([0.0], [None])

    with pytest.raises(ValueError, match=r"task 'task', score: failed: ZeroDivisionError: division by zero \("):
        score(fails_once)


def test_a_checked_task_is_not_checked_twice():
    task = checked(Fixed())
    assert isinstance(task, CheckedTask) and checked(task) is task
    assert (task.name, task.max_reward, task.invalid_reward) == ("task", 1.0, 0.0)
