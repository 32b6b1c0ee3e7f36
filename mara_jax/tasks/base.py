"""What a task is: prompts, a reward, and the answer of each completion; demonstrations to imitate where it has any."""

import abc
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Prompt = str | Sequence[Mapping[str, str]]  # a text, or chat messages, each with its role and content


def text_of(prompt: Prompt) -> str:
    """A prompt as one text: of chat messages their contents, a line each."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def is_prompt(value: object) -> bool:
    """Whether a value is a text, or a list of chat messages with at least one."""
    if isinstance(value, str):
        return True
    messages = list(value) if isinstance(value, list | tuple) else []
    return bool(messages) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in messages
    )


class TaskError(ValueError):
    """A message of a task that says all there is to say, in one line; other exceptions are shown with their place."""


@dataclass(frozen=True)
class Score:
    """Rewards and answers of n completions.

    Attributes:
      reward: [n] in reward units.
      answer: [n] what each completion answers, as a text that is equal for equal answers; None where it gives none.
      columns: other numbers of each completion, [n] each: their means are logged as `task/NAME`.
    """

    reward: Sequence[float] | np.ndarray
    answer: Sequence[str | None]
    columns: Mapping[str, Sequence[float] | np.ndarray] = field(default_factory=dict)


class LearnedReward(NamedTuple):
    """A reward model whose scores a task reads.

    where: as `hf.load` takes it; compute_dtype: of its matmuls.
    """

    where: str
    compute_dtype: str = "float32"


class Context(NamedTuple):
    """What a run knows of completions besides their texts.

    step: of the run, from 1; 0 for samples of the reference policy, and outside of training. ref_logp: [n] log-probs of
    the completions under the reference policy (nats); None where the task does not read them, or nothing knows them.
    learned: [n] scores of the task's reward model (reward units), or a text that says why there is none; None where the
    task names no such model.
    """

    step: int = 0
    ref_logp: Sequence[float] | None = None
    learned: Sequence[float | str] | None = None


class Task(abc.ABC):
    """A set of prompts with a reward.

    A task says how many prompts it has and scores completions; the rest has defaults. Nothing asks it for all of its
    prompts, so there may be any number.

    Attributes:
      name: as reports have it.
      max_reward: the largest reward that a completion can get, if it is known.
      invalid_reward: the reward of every completion without an answer, if there is one such number.
      reads_ref_logp: whether `score_in_run` wants the completions' log-probs under the reference policy.
      learned_reward: a reward model whose scores of the completions `score_in_run` wants, if any.
      leaves_out_truncated: whether completions that were cut at the length limit are left out of the update, so that
        E[R - beta log-ratio | finished] is maximised.
      answers_have_equally_many_strings: whether each answer of a declared set has as many good completions as any
        other, so that equally likely good strings mean equally likely answers.
      keeps_state: whether a score depends on earlier ones, or each is counted. Only the steps of training then ask for
        scores, once each and in one process, and `state` is saved with every checkpoint.
      lists_strings: whether the masses of answers come from `other_strings` and what training draws, in place of
        samples of the reference policy; such a task keeps state.
    """

    name: str = "task"
    max_reward: float | None = None
    invalid_reward: float | None = None
    reads_ref_logp: bool = False
    learned_reward: LearnedReward | None = None
    leaves_out_truncated: bool = False
    answers_have_equally_many_strings: bool = False
    keeps_state: bool = False
    lists_strings: bool = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many prompts there are."""

    @abc.abstractmethod
    def prompt(self, index: int) -> Prompt:
        """The user's message of a prompt, or chat messages, without any chat template; index from 0."""

    @abc.abstractmethod
    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """Scores completions.

        Args:
          prompt_index: [n] which prompt each completion answers.
          texts: [n] completions, cut before their end token.
          finished: [n] whether the completion ended with an end token; False where it was cut at the length limit.

        Returns:
          n rewards and n answers.
        """

    def score_in_run(
        self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool], context: Context
    ) -> Score:
        """As `score`, for a task whose rewards depend on the step or on the reference policy; by default `score`."""
        return self.score(prompt_index, texts, finished)

    def answer_set(self, index: int) -> tuple[str, ...] | None:
        """All answers that a prompt has, where they are known; answers are else discovered as they appear.

        With the complete set the distances to the optimum and to equal shares are logged.
        """
        return None

    def other_strings(self, index: int, text: str) -> Sequence[str]:
        """Completions of a prompt with the reward and the answer of `text`, all different, a pure function of what it
        means; none by default.

        With `lists_strings`, MARA over answers asks for those of every good completion: the mass of an answer is then
        summed over the good strings of it that are known, a lower bound that grows as more are drawn.
        """
        return []

    def state(self) -> Mapping[str, Any]:
        """What scores so far have changed, as plain data that JSON keeps exactly."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the place of the task that gave this state.

        Raises:
          ValueError: it is of another task.
        """
        del state  # there is none

    def ended(self) -> str:
        """Why training is over, in words, as after the last of a budget of scores; empty while it goes on.

        Asked after the scores of a step. Where training is over, the step has no update, as some of its completions may
        have no score.
        """
        return ""

    def write_report(self, folder: pathlib.Path) -> str:
        """Writes what the task shows of a run at its end, into the run's folder; returns lines that say it, if any."""
        return ""

    def close(self) -> None:
        """Ends what scoring has started, worker processes say; called at the end of a run, however it ends."""
        return

    def files(self) -> Sequence[str]:
        """Paths of files that prompts come from: a run is resumed only with the same bytes in them; none by default."""
        return []

    def code_files(self) -> Sequence[str]:
        """Paths of code that scores, beside the task's own module: a run that is resumed with other code says so."""
        return []

    def demonstrations(self, seed: int, step: int, batch: int) -> list[tuple[Prompt, str]]:
        """Completions to imitate in a warm-up, as a pure function of the arguments; none by default.

        Args:
          seed: chooses the whole stream.
          step: the step of the warm-up, from 0.
          batch: how many demonstrations a step sees.

        Returns:
          `batch` pairs (prompt, completion), the completion without its end token; an empty list where the task has no
          demonstrations.
        """
        return []

    def accepts_warm_up(self, answers: Sequence[str | None]) -> tuple[bool, str]:
        """Whether a warm-up may end, judged by the answers of samples of the policy.

        Args:
          answers: [n] None for samples without an answer.

        Returns:
          The verdict, and what it is based on, in a few words. By default six samples in ten must have an answer.
        """
        valid = sum(answer is not None for answer in answers) / max(len(answers), 1)
        return valid >= 0.6, f"{valid:.0%} with an answer (at least 60% are wanted)"
