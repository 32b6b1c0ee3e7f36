"""What a task is: prompts, a reward, the answer class of each completion, and demonstrations to imitate."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Score(NamedTuple):
    """Rewards and answers of n completions.

    Attributes:
      reward: float32 [n], in reward units.
      answer: int32 [n], index into the task's `answers`; -1 where the completion gives none.
    """

    reward: np.ndarray
    answer: np.ndarray


class Task(Protocol):
    """A set of prompts with a verifiable reward.

    Attributes:
      name: short name, as used in configs and reports.
      prompts: the user messages, without any chat template.
      answers: the names of the answer classes; `Score.answer` indexes them.
      answers_have_equally_many_strings: whether each answer class has as many good completions as any
        other, so that equally likely good strings mean equally likely answers.
      max_reward: the largest reward any completion can get: a threshold above it selects nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def prompts(self) -> tuple[str, ...]: ...

    @property
    def answers(self) -> tuple[str, ...]: ...

    @property
    def max_reward(self) -> float: ...

    @property
    def answers_have_equally_many_strings(self) -> bool: ...

    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """Scores completions.

        Args:
          prompt_index: [n] index into `prompts` of the prompt that each completion answers.
          texts: [n] completions, cut before their end token.
          finished: [n] whether the completion ended with an end token; False where it was cut at the length limit.

        Returns:
          Score of n rewards and n answer classes.
        """
        ...

    def demonstrations(self, seed: int, step: int, batch: int) -> list[tuple[str, str]]:
        """Completions to imitate in a warm-up, as a pure function of the arguments.

        Args:
          seed: chooses the whole stream.
          step: the training step, from 0.
          batch: how many demonstrations a step sees.

        Returns:
          `batch` pairs (prompt, completion), the completion without its end token.
        """
        ...
