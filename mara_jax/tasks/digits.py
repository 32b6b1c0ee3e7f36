"""Digits in a range: a small task with any number of prompts, each with answers of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mara_jax import config
from mara_jax.config import limits, setting
from mara_jax.tasks.base import Score, Task

_ANSWER = re.compile(r"\s*<answer>\s*([0-9])\s*</answer>\s*")
_RANGES = [(low, high) for low in range(10) for high in range(low + 1, 10)]


@dataclass(frozen=True)
class Config(config.Task):
    """Digits in a range: a small task with any number of prompts, each with answers of its own."""

    module: str = config.task_module(__name__)
    prompts: int = setting(1000, "how many prompts; each names a range of digits", limits.COUNT)
    declared: bool = setting(False, "whether the task declares the answers of each prompt, instead of finding them")
    favour: float = setting(0.5, "share of the demonstrations that answer with the lowest digit", limits.SHARE)


class Digits(Task):
    """Reward 1 for one digit of the prompt's range in answer tags, else 0."""

    name = "digits"
    max_reward = 1.0
    invalid_reward = 0.0
    answers_have_equally_many_strings = True  # white space aside, each answer is one string

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __len__(self) -> int:
        return self.cfg.prompts

    def prompt(self, index: int) -> str:
        """The prompt of a number; its range depends on the number alone."""
        low, high = _range(index)
        return f"Request {index}: name a digit from {low} to {high}."

    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """Reward 1 and the digit where it lies in the range, else 0 and no answer."""
        answers = [
            _digit(index, text) if done else None
            for index, text, done in zip(prompt_index, texts, finished, strict=True)
        ]
        return Score([float(answer is not None) for answer in answers], answers)

    def answer_set(self, index: int) -> tuple[str, ...] | None:
        """The digits of the range, if the config says so."""
        low, high = _range(index)
        return tuple(map(str, range(low, high + 1))) if self.cfg.declared else None

    def demonstrations(self, seed: int, step: int, batch: int) -> list[tuple[str, str]]:
        """Answers to prompts drawn at random: a share `favour` with the lowest digit, the others with any."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step])))
        pairs = []
        for index in rng.integers(0, len(self), batch).tolist():
            low, high = _range(index)
            digit = low if rng.random() < self.cfg.favour else int(rng.integers(low, high + 1))
            pairs.append((self.prompt(index), f"<answer>{digit}</answer>"))
        return pairs


def _range(index: int) -> tuple[int, int]:
    return _RANGES[index % len(_RANGES)]


def _digit(index: int, text: str) -> str | None:
    written = _ANSWER.fullmatch(text)
    low, high = _range(index)
    return written[1] if written and low <= int(written[1]) <= high else None


def make(cfg: Config) -> Digits:
    """The task with these settings."""
    return Digits(cfg)
