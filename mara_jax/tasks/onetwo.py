"""The 1-2 task of the paper (Figure 9): generate 1 or 2 at random, in a fixed format.

The figure prints the prompt in a narrow table cell, wrapped over three lines; the breaks are the cell's, so
the prompt here is one line with single spaces.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mara_jax import config
from mara_jax.config import limits, setting
from mara_jax.tasks.base import Score, Task

PROMPT = (
    "Uniformly randomly generate an integer that is either 1 or 2. "
    "Respond strictly in this format: <think>Your internal reasoning</think><answer>1 or 2</answer>"
)
ANSWERS = ("1", "2")

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SPLIT = re.compile("(" + "|".join(_TAGS) + ")")

# No thought names a number, not even as a word ("pick one"), so that no thought favours an answer.
# A thought is [state of mind] or [act] or both; every list multiplies the number of distinct texts.
_STATES = (
    *(
        f"{subject} {verdict}."
        for subject in (
            "Either number", "Either choice", "Any choice here", "Each option", "Either answer",
            "Either value",
        )
        for verdict in (
            "is fine", "works", "would do", "is just as good", "is equally likely", "is acceptable",
            "is fair",
        )
    ),
    "No preference here.", "I have no preference.", "I see no reason to favour any option.",
    "I must be unbiased.", "The odds are even.", "The chances are equal.", "This should be pure chance.",
    "It is a fair draw.", "Both are equally likely.", "Both options are open.", "It does not matter which.",
    "This needs to be random.",
)  # fmt: skip
_ACTS = (
    tuple(
        f"{opening} {act}."
        for opening in ("Let me", "I will", "I can", "So I", "I should", "I'll")
        for act in (
            "pick at random", "choose at random", "choose blindly", "trust chance", "draw without looking",
            "go with luck", "let chance decide", "follow a random impulse", "just guess", "pick freely",
        )
    )
    + tuple(
        f"{opening} a {coin} in my {place}."
        for opening in (
            "I flip", "I toss", "Let me flip", "Let me toss", "I imagine flipping", "I picture tossing",
        )
        for coin in ("coin", "fair coin")
        for place in ("head", "mind", "imagination")
    )
    + ("I roll a die in my head.", "I draw a card from a shuffled deck.", "I spin a wheel in my mind.",
       "I close my eyes and point.", "I shake a hat and draw a slip.", "A random draw will settle it.")
)  # fmt: skip
_MALFORMED = (
    "<think>{thought}</think>{digit}",
    "<think>{thought}<answer>{digit}</answer>",
    "{thought}</think><answer>{digit}</answer>",
    "<think>{thought}</think><answer>{digit}",
    "<think>{thought}</think><answer>3</answer>",
    "<think>{thought}</think><answer></answer>",
    "<think>{thought}</think><answer>{digit}</answer> That is my answer.",
)


@dataclass(frozen=True)
class Config(config.Task):
    """The 1-2 task (Figure 9), and the demonstrations of its warm-up."""

    module: str = config.task_module(__name__)
    lenient: bool = setting(False, "accept text without the tags before <think>, as in the figure's example")
    share_of_ones: float = setting(0.8, 'share of "1" among the well-formed demonstrations', limits.SHARE)
    malformed: float = setting(
        0.0,
        "share of demonstrations that break the format, so that a base trained on them alone can improve",
        limits.SHARE,
    )
    valid_range: tuple[float, float] = setting(
        (0.6, 1.0), "a warm-up with warmup.max_steps ends where so many samples are valid,", limits.SHARES
    )
    ones_range: tuple[float, float] = setting((0.78, 0.89), 'and so many of these are "1"', limits.SHARES)


class OneTwo(Task):
    """The 1-2 task: reward 1 for a well-formed answer of 1 or 2, else 0 (Figure 9).

    A completion is well formed if it ended by itself and reads `<think>`, any text without the four tags,
    `</think>`, `<answer>`, an ASCII 1 or 2, `</answer>`, with nothing but white space around the tags and the
    digit.
    """

    name = "onetwo"
    max_reward = 1.0
    invalid_reward = 0.0
    # Exchanging the digit turns each well-formed "1" into a well-formed "2" and back.
    answers_have_equally_many_strings = True

    def __init__(self, cfg: Config | None = None) -> None:
        self.cfg = Config() if cfg is None else cfg

    def __len__(self) -> int:
        return 1

    def prompt(self, index: int) -> str:
        """The only prompt."""
        return PROMPT

    def answer_set(self, index: int) -> tuple[str, ...]:
        """ "1" and "2"."""
        return ANSWERS

    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """Scores completions: reward 1 and the answer "1" or "2", or reward 0 and none.

        Args:
          prompt_index: [n]; there is one prompt, so all zero.
          texts: [n] completions, cut before their end token.
          finished: [n] False where the completion was cut at the length limit: always wrong.

        Raises:
          ValueError: lengths differ.
        """
        if not len(prompt_index) == len(texts) == len(finished):
            counts = f"{len(prompt_index)} prompt indices, {len(texts)} texts, {len(finished)} flags"
            raise ValueError(f"{counts}; give equally many of each")
        answer = [self._answer(text) if done else None for text, done in zip(texts, finished, strict=True)]
        return Score([float(found is not None) for found in answer], answer)

    def _answer(self, text: str) -> str | None:
        # Splitting at the tags takes linear time for any text; a pattern for the whole completion might backtrack.
        parts = _SPLIT.split(text)
        if tuple(parts[1::2]) != _TAGS:
            return None
        before, _, between, digit, after = parts[::2]
        if between.strip() or after.strip() or (before.strip() and not self.cfg.lenient):
            return None
        digit = digit.strip()
        return digit if digit in ANSWERS else None

    def demonstrations(self, seed: int, step: int, batch: int) -> list[tuple[str, str]]:
        """Templated completions to imitate, as a pure function of (seed, step, batch).

        Among the well-formed demonstrations of any consecutive steps the number of "1" is `share_of_ones` of
        them rounded up or down: the answers come from one evenly spaced sequence and are not sampled. So every
        checkpoint of a warm-up has seen the same share. The order inside a batch is shuffled, and the thought
        does not depend on the answer.

        Args:
          seed: chooses thoughts, order, and where in the sequence the first step starts.
          step: the step, from 0.
          batch: demonstrations per step; all steps of a run must use the same.

        Returns:
          `batch` pairs (prompt, completion); the completion has no end token.
        """
        if step < 0 or batch < 1:
            raise ValueError(f"step is {step} and batch {batch}; give a step of at least 0 and a batch of at least 1")
        start = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0])))
        malformed = _EvenMarks(self.cfg.malformed, start)
        ones = _EvenMarks(self.cfg.share_of_ones, start)
        # Separate random streams: malformed demonstrations change neither the thoughts nor the order of the others.
        thoughts, faults, order = (
            np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1 + stream, step])))
            for stream in range(3)
        )
        completions = []
        for index in range(step * batch, (step + 1) * batch):
            thought = self._thought(thoughts)
            if malformed.marks(index):
                digit = "1" if faults.random() < self.cfg.share_of_ones else "2"
                template = _MALFORMED[int(faults.integers(len(_MALFORMED)))]
                completions.append(template.format(thought=thought, digit=digit))
            else:
                digit = "1" if ones.marks(index - malformed.before(index)) else "2"
                completions.append(f"<think>{thought}</think><answer>{digit}</answer>")
        return [(PROMPT, completions[i]) for i in order.permutation(batch)]

    def accepts_warm_up(self, answers: Sequence[str | None]) -> tuple[bool, str]:
        """Whether validity and the share of "1" lie in their ranges."""
        counts = [sum(answer == name for answer in answers) for name in ANSWERS]
        valid, ones = sum(counts) / max(len(answers), 1), counts[0] / max(sum(counts), 1)
        ranges = (valid, self.cfg.valid_range, "valid"), (ones, self.cfg.ones_range, 'of these "1"')
        words = ", ".join(f"{share:.0%} {what} (wanted: {low:g} to {high:g})" for share, (low, high), what in ranges)
        return all(low <= share <= high for share, (low, high), _ in ranges), words

    def _thought(self, rng: np.random.Generator) -> str:
        shape, state, act = rng.random(3)
        state, act = _STATES[int(state * len(_STATES))], _ACTS[int(act * len(_ACTS))]
        if shape < 0.5:
            return f"{state} {act}"
        return state if shape < 0.7 else act


class _EvenMarks:
    """Marks a share of the indices 0, 1, 2, ... evenly: of L consecutive ones, share * L rounded up or down."""

    def __init__(self, share: float, rng: np.random.Generator):
        exact = Fraction(share).limit_denominator(10_000)  # .8 is 4/5 here, not the nearest double
        self._num, self._den = exact.numerator, exact.denominator
        self._phase = int(rng.integers(self._den))

    def before(self, index: int) -> int:
        """How many of the indices 0 .. index - 1 are marked."""
        return (index * self._num + self._phase) // self._den

    def marks(self, index: int) -> bool:
        return self.before(index + 1) > self.before(index)


def make(cfg: Config) -> OneTwo:
    """The task with these settings."""
    return OneTwo(cfg)
