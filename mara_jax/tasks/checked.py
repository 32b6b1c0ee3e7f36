"""A task whose values are checked before anything uses them: tasks are their authors' Python, and can be wrong."""

import math
import os
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mara_jax.tasks.base import Context, Prompt, Score, Task, TaskError, is_prompt

_LARGEST = float(np.finfo(np.float32).max)
_ROUNDING = 1e-6  # relative, of rewards in float32


class CheckedTask(Task):
    """Another task, whose every value has the type, the length and the range that `Task` promises.

    Each error is a ValueError of one line that names the task, its method, the prompt and the value.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.name = str(task.name)
        self.max_reward, self.invalid_reward = (self._limit(name) for name in ("max_reward", "invalid_reward"))
        self.reads_ref_logp = bool(task.reads_ref_logp)
        self.learned_reward = task.learned_reward
        self.leaves_out_truncated = bool(task.leaves_out_truncated)
        self.answers_have_equally_many_strings = bool(task.answers_have_equally_many_strings)
        self.keeps_state, self.lists_strings = bool(task.keeps_state), bool(task.lists_strings)

    def __len__(self) -> int:
        return self._value("__len__()", lambda: len(self.task))

    def prompt(self, index: int) -> Prompt:
        """As of the task: a text or chat messages."""
        prompt = self._value(f"prompt({index})", lambda: self.task.prompt(index))
        if not is_prompt(prompt):
            raise self._error(f"prompt({index})", f"returned {prompt!r:.80}: return a text, or a list of chat messages")
        return prompt

    def answer_set(self, index: int) -> tuple[str, ...] | None:
        """As of the task: different texts, at least one, or None."""
        where = f"answer_set({index})"
        answers = self._value(where, lambda: self.task.answer_set(index))
        if answers is None:
            return None
        texts = isinstance(answers, tuple | list) and all(isinstance(answer, str) for answer in answers)
        if not texts or not answers or len(set(answers)) < len(answers):
            raise self._error(
                where, f"returned {answers!r:.80}: return a tuple of different texts, or None where they are not known"
            )
        return tuple(answers)

    def other_strings(self, index: int, text: str) -> list[str]:
        """As of the task: texts."""
        where = f"other_strings({index}, {text!r:.80})"
        strings = self._value(where, lambda: list(self.task.other_strings(index, text)))
        if not all(isinstance(one, str) for one in strings):
            raise self._error(where, f"returned {strings!r:.80}: return a list of texts")
        return strings

    def state(self) -> Mapping[str, Any]:
        """As of the task: plain data."""
        return self._value("state()", self.task.state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """As of the task."""
        self._value("restore", lambda: self.task.restore(state))

    def ended(self) -> str:
        """As of the task: words."""
        return self._value("ended()", lambda: str(self.task.ended()))

    def write_report(self, folder: pathlib.Path) -> str:
        """As of the task: lines."""
        return self._value("write_report", lambda: str(self.task.write_report(folder)))

    def close(self) -> None:
        """As of the task."""
        self._value("close()", self.task.close)

    def files(self) -> Sequence[str]:
        """As of the task: paths."""
        return self._paths("files()", self.task.files)

    def code_files(self) -> Sequence[str]:
        """As of the task: paths."""
        return self._paths("code_files()", self.task.code_files)

    def _paths(self, where: str, call: Callable[[], Sequence[str]]) -> list[str]:
        files = self._value(where, lambda: [os.fspath(path) for path in call()])
        for path in files:
            if not isinstance(path, str) or not os.path.isfile(path):
                raise self._error(where, f"returned {path!r:.200}: return paths of files that are there")
        return files

    def demonstrations(self, seed: int, step: int, batch: int) -> list[tuple[Prompt, str]]:
        """As of the task: `batch` pairs of texts, or none."""
        where = f"demonstrations({seed}, {step}, {batch})"
        pairs = self._value(where, lambda: list(self.task.demonstrations(seed, step, batch)))
        for pair in pairs:
            whole = isinstance(pair, tuple | list) and len(pair) == 2
            if not whole or not is_prompt(pair[0]) or not isinstance(pair[1], str):
                raise self._error(where, f"returned {pair!r:.80}: each is a pair, prompt and completion")
        if len(pairs) not in (0, batch):
            raise self._error(where, f"returned {len(pairs)} pairs: return {batch}, or none at all")
        return [(prompt, completion) for prompt, completion in pairs]

    def accepts_warm_up(self, answers: Sequence[str | None]) -> tuple[bool, str]:
        """As of the task: a verdict and words."""
        verdict = self._value("accepts_warm_up", lambda: self.task.accepts_warm_up(answers))
        if not isinstance(verdict, tuple) or [type(part) for part in verdict] != [bool, str]:
            raise self._error("accepts_warm_up", f"returned {verdict!r:.80}: return True or False, and a text")
        return verdict

    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """As `score_in_run`, outside of a run."""
        return self.score_in_run(prompt_index, texts, finished, Context())

    def score_in_run(
        self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool], context: Context
    ) -> Score:
        """As of the task: finite numbers, and answers that belong to the declared set where there is one."""
        verdict = self._scored(prompt_index, texts, finished, context)
        if not isinstance(verdict, Score):
            raise self._error("score", f"returned {verdict!r:.80} instead of a mara_jax.tasks.Score")
        if not isinstance(verdict.columns, Mapping):
            raise self._error("score", f"returned columns={verdict.columns!r:.80}: give names with lists of numbers")
        answer = self._answers(verdict.answer, prompt_index)
        reward = self._numbers("reward", verdict.reward, prompt_index)
        self._check_range(reward, answer, prompt_index)
        columns = {str(name): self._numbers(name, x, prompt_index) for name, x in verdict.columns.items()}
        return Score(reward, answer, columns)

    def _scored(
        self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool], context: Context
    ) -> Any:
        """What the task returns; where it raises, the completion at which it does is found by scoring each alone."""
        try:
            return self.task.score_in_run(prompt_index, texts, finished, context)
        except TaskError:
            raise
        except Exception as whole:
            error, found = whole, ""
            for row, (number, text, ended) in enumerate(zip(prompt_index, texts, finished, strict=True)):
                ref_logp, learned = (values and [values[row]] for values in (context.ref_logp, context.learned))
                alone_in_run = context._replace(ref_logp=ref_logp, learned=learned)
                try:
                    self.task.score_in_run([number], [text], [ended], alone_in_run)
                except Exception as alone:
                    error, found = alone, f" of the completion {text!r:.80} of prompt {number}"
                    break
            raise self._failed(f"score{found}", error) from error

    def _answers(self, answers: Any, numbers: Sequence[int]) -> list[str | None]:
        """One answer or None for each completion, in order."""
        if not isinstance(answers, Sequence | np.ndarray) or isinstance(answers, str | bytes):
            raise self._error("score", f"returned answers {answers!r:.80}: return a list of texts")
        if len(answers) != len(numbers):
            raise self._error(
                "score", f"returned {len(answers)} answers for {len(numbers)} completions: return one for each, or None"
            )
        declared = {number: self.answer_set(number) for number in set(numbers)}
        for number, answer in zip(numbers, answers, strict=True):
            if answer is None:
                continue
            if not isinstance(answer, str):
                raise self._error(
                    "score", f"returned the answer {answer!r:.80} to prompt {number}: return a text, or None"
                )
            known = declared[number]
            if known is not None and answer not in known:
                raise self._error(
                    "score", f"returned the answer {answer!r:.80} to prompt {number}, whose answer set lacks it: add it"
                )
        return [None if answer is None else str(answer) for answer in answers]

    def _numbers(self, column: str, values: Any, numbers: Sequence[int]) -> np.ndarray:
        """[n] float32: one finite number for each completion."""
        try:
            array = np.asarray(values)
        except Exception as error:  # lists of unequal lengths, an object that is no list
            raise self._error("score", f"returned {column!r} that are no list of numbers ({error})") from error
        if array.shape != (len(numbers),):
            raise self._error("score", f"returned {column!r} of shape {array.shape} for {len(numbers)} completions")
        for number, value in zip(numbers, array.tolist(), strict=True):
            if not is_number(value):
                raise self._error(
                    "score",
                    f"returned {column!r} {value!r:.80} for a completion of prompt {number}: return finite numbers",
                )
        return array.astype(np.float32)

    def _check_range(self, reward: np.ndarray, answer: Sequence[str | None], numbers: Sequence[int]) -> None:
        """Rewards keep the promises of `max_reward` and `invalid_reward`: methods are accepted because of them."""
        for number, value, given in zip(numbers, reward.tolist(), answer, strict=True):
            most, invalid = self.max_reward, self.invalid_reward
            where = f"returned 'reward' {value:g} for a completion of prompt {number}"
            if most is not None and value > most and not math.isclose(value, most, rel_tol=_ROUNDING):
                raise self._error("score", f"{where}, above its max_reward={most:g}: mend one of the two")
            if given is None and invalid is not None and not math.isclose(value, invalid, rel_tol=_ROUNDING):
                raise self._error(
                    "score", f"{where} without an answer, but its invalid_reward={invalid:g}: mend one of the two"
                )

    def _limit(self, name: str) -> float | None:
        value = getattr(self.task, name)
        if value is not None and not is_number(value):
            raise self._error(name, f"is {value!r:.80}: give a finite number, or None where it is not known")
        return value

    def _value(self, where: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except TaskError:
            raise
        except Exception as error:
            raise self._failed(where, error) from error

    def _failed(self, where: str, error: Exception) -> ValueError:
        return self._error(where, f"failed: {described(error)}")

    def _error(self, where: str, words: str) -> ValueError:
        return ValueError(f"the task {self.name!r}, {where}: {words}")


def described(error: BaseException) -> str:
    """An exception of somebody's code in one line: its kind, its words, and the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({place.filename}, line {place.lineno})"


def checked(task: Task) -> CheckedTask:
    """The task with checks; one that has them already comes back as it is."""
    return task if isinstance(task, CheckedTask) else CheckedTask(task)


def is_number(value: Any) -> bool:
    """Whether float32 holds it: no text, no complex number, neither NaN nor infinite."""
    try:
        return not isinstance(value, str | bytes) and abs(float(value)) <= _LARGEST
    except (TypeError, ValueError, OverflowError):
        return False
