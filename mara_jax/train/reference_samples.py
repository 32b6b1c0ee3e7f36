"""Samples of the reference policy under each prompt: drawn once, kept in the run directory, read back on resume."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax import config
from mara_jax.core import forecast, method_rules
from mara_jax.parallel import hosts
from mara_jax.train import workdir as workdirs

FILE = "reference_samples.jsonl"
BEFORE_TRAINING, ON_FIRST_USE = 256, 16  # samples of a prompt, unless the config says


class PromptSamples(NamedTuple):
    """n scored completions of one prompt: reward, logp [n] (nats, whole completions); answer and text, lists."""

    reward: np.ndarray
    answer: list[str | None]
    logp: np.ndarray
    text: list[str]

    def indexed(self, answers: Sequence[str]) -> forecast.Samples:
        """As core.forecast takes them, with answers as indices into `answers`."""
        index = {name: number for number, name in enumerate(answers)}
        answer = np.array([-1 if name is None else index[name] for name in self.answer])
        return forecast.Samples(self.reward, answer, self.logp)


Draw = Callable[[np.ndarray], list[PromptSamples]]  # numbers of prompts -> samples of each


def before_training(run: config.LanguageRun, prompts: int) -> bool:
    """Whether the reference policy is sampled under every prompt of a task before training."""
    drawn = run.reference.drawn
    if drawn != "auto":
        return drawn == "before_training"
    return prompts <= config.FEW_PROMPTS and run.rollout.long_prompts == "error"


def count(run: config.LanguageRun, prompts: int) -> int:
    """How many samples of each prompt a run draws."""
    return run.reference.samples or (BEFORE_TRAINING if before_training(run, prompts) else ON_FIRST_USE)


def reads_masses(algorithm: config.Algorithm) -> bool:
    """Whether the method reads the masses of answers under the reference."""
    return "masses" in method_rules.needs(algorithm)


class ReferenceSamples:
    """The samples of a run's prompts, in WORKDIR/reference_samples.jsonl.

    They depend on the reference policy, the seed and the prompt alone, never on the step at which a prompt is first
    used. Once drawn they stay: a resumed run reads them, even those of prompts that came after its checkpoint.
    """

    def __init__(self, path: pathlib.Path | None, count: int, at_once: int) -> None:
        """Reads what an earlier start of the run has kept.

        Args:
          path: the file; None keeps the samples in memory alone.
          count: samples of a prompt.
          at_once: prompts whose samples are drawn together.
        """
        self.path, self.count, self.at_once = path, count, at_once
        rows = [] if path is None else hosts.on_process_zero(lambda: _complete_rows(path, count))
        self.known = {number: _from_rows(group) for number, group in _by_prompt(rows).items()}

    def of(self, ids: Sequence[int] | np.ndarray, draw: Draw) -> list[PromptSamples]:
        """The samples of these prompts; those that are missing are drawn, scored and kept first.

        Args:
          ids: numbers of the prompts in the data.
          draw: makes the samples of `at_once` prompts.
        """
        missing = [number for number in dict.fromkeys(int(i) for i in ids) if number not in self.known]
        for first in range(0, len(missing), self.at_once):
            chunk = missing[first : first + self.at_once]
            # Always equally many prompts: one program serves all calls.
            padded = np.array(chunk + chunk[-1:] * (self.at_once - len(chunk)))
            drawn = dict(zip(chunk, draw(padded), strict=False))
            self.add(drawn)
        return [self.known[int(i)] for i in ids]

    def add(self, drawn: dict[int, PromptSamples]) -> None:
        """Keeps the samples of prompts that have none yet."""
        path = self.path
        if path is not None:
            hosts.on_process_zero(lambda: _append(path, drawn))
        self.known |= drawn


def _append(path: pathlib.Path, drawn: dict[int, PromptSamples]) -> None:
    """Adds samples to the file, each prompt's in one write."""
    with path.open("a", encoding="utf-8") as file:
        for number, samples in drawn.items():
            file.write("".join(json.dumps(row) + "\n" for row in _rows(number, samples)))
            file.flush()


def _rows(number: int, samples: PromptSamples) -> list[dict[str, Any]]:
    columns = zip(samples.logp.tolist(), samples.reward.tolist(), samples.answer, samples.text, strict=True)
    names = ("prompt", "ref_logp", "reward", "answer", "text")
    return [dict(zip(names, (number, *row), strict=True)) for row in columns]


def _complete_rows(path: pathlib.Path, count: int) -> list[dict[str, Any]]:
    """The rows of the prompts that have all samples; a kill may have cut the file short, and it is then mended.

    Raises:
      ValueError: a whole line that is no sample.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty, or cut short
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("prompt", "ref_logp", "reward", "answer", "text")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no sample: delete the file, and samples are drawn again"
            ) from error
    complete = [row for group in _by_prompt(rows).values() if len(group) == count for row in group]
    if len(complete) < len(rows) or lines[-1]:
        workdirs.replace(path, "".join(json.dumps(row) + "\n" for row in complete))
    return complete


def _by_prompt(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return groups


def _from_rows(rows: list[dict[str, Any]]) -> PromptSamples:
    reward, logp = (np.array([row[name] for row in rows]) for name in ("reward", "ref_logp"))
    return PromptSamples(
        reward.astype(np.float32),
        [row["answer"] for row in rows],
        logp.astype(np.float64),
        [row["text"] for row in rows],
    )
