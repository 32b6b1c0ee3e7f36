"""WORKDIR/modes.jsonl: the good answers of each prompt, their mass under reference, policy and optimum, when they came.

The ledger is a function of the rows of metrics.jsonl and of the samples of the reference policy, both of which a run
keeps: a resumed run reads it off them, and goes on with the one that an uninterrupted run has.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mara_jax.core import method_rules, modes
from mara_jax.tasks.base import text_of
from mara_jax.train import group_metrics, reference, strict_json
from mara_jax.train import workdir as workdirs
from mara_jax.train.reference_samples import PromptSamples
from mara_jax.train.setup import Setup

FILE = "modes.jsonl"
# Of a row of metrics.jsonl: for each prompt, [its number, how often each answer was given]; so of good completions.
COUNTS, GOOD = "answers/by_prompt", "answers/good_by_prompt"
MOST_ANSWERS = 64  # of a prompt: those that the reference gives, frequent ones first, then others as they come
WINDOW = 64  # completions of a prompt, at least, over which the policy's masses are measured
LONGEST_PROMPT = 200  # characters of it in the file
OFTEN_WRITTEN = 1 << 20  # bytes; a larger file is written where a checkpoint or an evaluation follows


@dataclasses.dataclass
class Mode:
    """A good answer of a prompt: sightings among the reference's samples; steps at which the policy gave it first and
    last; missed: completions of the prompt since; peak: its largest share of a window of at least WINDOW."""

    sightings: int = 0
    first: int | None = None
    last: int | None = None
    missed: int = 0
    peak: float = 0.0


class Visit(NamedTuple):
    """A step's completions of one prompt: how many, and how often each good answer was given."""

    completions: int
    good: dict[str, int]


class PromptModes:
    """The good answers of one prompt.

    samples: of the reference policy, None where there are none; threshold: reward from which a completion is good.
    """

    def __init__(self, samples: PromptSamples | None, threshold: float) -> None:
        self.samples, self.completions, self.left_out = samples, 0, 0
        self.window: collections.deque[Visit] = collections.deque()
        given: collections.Counter[str] = collections.Counter()
        if samples is not None:
            pairs = zip(samples.answer, samples.reward >= np.float32(threshold), strict=True)
            given.update(group_metrics.short(name) for name, good in pairs if good and name is not None)
        self.modes = {name: Mode(sightings=count) for name, count in given.most_common(MOST_ANSWERS)}

    def add(self, step: int, visit: Visit) -> None:
        """Counts a step's completions."""
        self.completions += visit.completions
        self.window.append(visit)
        while self.in_window - self.window[0].completions >= WINDOW:
            self.window.popleft()
        for name, count in visit.good.items():
            if name not in self.modes and len(self.modes) >= MOST_ANSWERS:
                self.left_out += count
            else:
                self.modes.setdefault(name, Mode())
        for name, mode in self.modes.items():
            if visit.good.get(name):
                mode.first = step if mode.first is None else mode.first
                mode.last, mode.missed = step, 0
            else:
                mode.missed += visit.completions
            if self.in_window >= WINDOW:
                mode.peak = max(mode.peak, self.share(name))

    @property
    def in_window(self) -> int:
        """Completions of the latest visits that make up WINDOW, or of all so far."""
        return sum(visit.completions for visit in self.window)

    def share(self, name: str) -> float:
        """The policy's mass of an answer, over the window."""
        return sum(visit.good.get(name, 0) for visit in self.window) / self.in_window


class Lost(NamedTuple):
    """An answer that the policy no longer gives; optimum: its mass there."""

    number: int
    name: str
    optimum: float
    mode: Mode


class ModeLedger:
    """The ledger of a run, written at its steps on one process."""

    def __init__(self, setup: Setup, path: pathlib.Path, rows: Iterable[dict[str, Any]], keeps: bool) -> None:
        """Reads the ledger off the rows of the steps that are done.

        Args:
          path: of the file; keeps: whether this process writes it: on others there is no ledger.
        """
        self.setup, self.path, self.keeps = setup, path, keeps
        self.prompts: dict[int, PromptModes] = {}
        self.optima: dict[int, tuple[int, dict[str, float]]] = {}  # of a prompt, for so many answers
        self.lost: dict[int, dict[str, Lost]] = {}
        self.lines: dict[int, str] = {}
        if not keeps:
            return
        for row in rows:
            if GOOD in row:  # versions before the ledger wrote rows without
                self._add(row)
        self._assess(list(self.prompts))
        self.write()

    def update(self, row: dict[str, Any], to_save: bool = False) -> tuple[dict[str, int], str]:
        """Adds a step, and writes the file.

        Args:
          row: of the step; to_save: whether a checkpoint or an evaluation follows.

        Returns:
          `modes/known`, good answers of the prompts so far, and `modes/lost`, those that are lost; and a line where
          some are lost since the step before, empty where none is.
        """
        if not self.keeps:
            return {}, ""
        newly = self._assess(self._add(row))
        if to_save or sum(map(len, self.lines.values())) <= OFTEN_WRITTEN:
            self.write()
        known, lost = (sum(map(len, of)) for of in ([one.modes for one in self.prompts.values()], self.lost.values()))
        return {"modes/known": known, "modes/lost": lost}, alarm(newly) if newly else ""

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        workdirs.replace(self.path, "".join(self.lines[number] for number in sorted(self.lines)))

    def _add(self, row: dict[str, Any]) -> list[int]:
        """Counts a row's completions; returns the numbers of its prompts."""
        good = {number: counted for number, counted in row[GOOD]}
        for number, counted in row[COUNTS]:
            if number not in self.prompts:
                store = self.setup.ref_samples
                samples = None if store is None else store.known.get(number)
                self.prompts[number] = PromptModes(samples, self.setup.cfg.algorithm.threshold)
            self.prompts[number].add(row["step"], Visit(sum(counted.values()), good[number]))
        return [number for number, _ in row[COUNTS]]

    def _assess(self, numbers: list[int]) -> list[Lost]:
        """Renews what is said of these prompts; returns the answers that were not lost before."""
        newly = []
        for number in numbers:
            one, optimum = self.prompts[number], self._optimum(number)
            before, self.lost[number] = self.lost.get(number, {}), {}
            for name, mode in one.modes.items():
                if _is_lost(one, mode, optimum.get(name)):
                    self.lost[number][name] = Lost(number, name, optimum[name], mode)
            newly += [lost for name, lost in self.lost[number].items() if name not in before]
            self.lines[number] = strict_json.text(self._row(number, optimum)) + "\n"
        return newly

    def _optimum(self, number: int) -> dict[str, float]:
        """Mass at the run's own optimum of each answer that samples of the reference gave; empty if it is not known."""
        one = self.prompts[number]
        if self.optima.get(number, (None,))[0] != len(one.modes):
            self.optima[number] = len(one.modes), optimum_of(self.setup, number, one)
        return self.optima[number][1]

    def _row(self, number: int, optimum: dict[str, float]) -> dict[str, Any]:
        """What the file says of a prompt."""
        one = self.prompts[number]
        samples = 0 if one.samples is None else len(one.samples.answer)
        prompt = " ".join(text_of(self.setup.task.prompt(number)).split())
        answers = [
            {
                "answer": name,
                "reference": mode.sightings / samples if samples else None,
                "policy": one.share(name),
                "optimum": optimum.get(name),
                "peak": mode.peak,
                "first_step": mode.first,
                "last_step": mode.last,
                "missed": mode.missed,
                "lost": name in self.lost[number],
            }
            for name, mode in one.modes.items()
        ]
        return {
            "prompt_id": number,
            "prompt": prompt if len(prompt) <= LONGEST_PROMPT else f"{prompt[: LONGEST_PROMPT - 1]}…",
            "completions": one.completions,
            "window": one.in_window,
            "reference_samples": samples,
            "left_out": one.left_out,
            "answers": answers,
        }


def _is_lost(one: PromptModes, mode: Mode, optimum: float | None) -> bool:
    """Whether an answer that once had a tenth of its mass at the optimum, in the reference or the policy, has it no
    longer; of one that no sample of the reference shows, or whose optimum is not known, nothing is said."""
    if optimum is None or one.samples is None or not mode.sightings:
        return False
    once = max(mode.sightings / len(one.samples.answer), mode.peak)
    return once >= modes.SHARE * optimum and modes.is_lost(mode.missed, optimum, mode.sightings)


def optimum_of(setup: Setup, number: int, one: PromptModes) -> dict[str, float]:
    """Mass at the run's own optimum of a prompt's good answers that samples of the reference gave; empty if unknown."""
    algorithm, samples = setup.cfg.algorithm, one.samples
    seen = [name for name, mode in one.modes.items() if mode.sightings]
    if samples is None or not seen or method_rules.forecast_method(algorithm) is None:
        return {}
    objective = reference.objective_of(algorithm)
    if objective.method == "strings":
        declared = setup.task.answer_set(number)
        known = None if declared is None else reference.log_optimum(algorithm, samples, declared, setup.task)
        if declared is None or known is None:
            return {}
        mass = dict(zip(map(group_metrics.short, declared), np.exp(known).tolist(), strict=False))
        return {name: mass[name] for name in seen if name in mass}
    index = {name: place for place, name in enumerate(one.modes)}
    # A good answer beyond the bound counts as none, as a bad one does.
    answer_n = np.array([-1 if name is None else index.get(group_metrics.short(name), -1) for name in samples.answer])
    mass_a = modes.optimum_mass(objective, samples.reward, answer_n, len(index))
    return {name: float(mass_a[index[name]]) for name in seen}


def alarm(lost: list[Lost]) -> str:
    """A line that says which answers the policy has lost at this step, the one of the largest mass in full."""
    worst = max(lost, key=lambda one: one.optimum)
    expected = modes.SHARE * worst.optimum * worst.mode.missed
    last = "never given" if worst.mode.last is None else f"last given at step {worst.mode.last}"
    more = f"; {len(lost) - 1} more are lost" if len(lost) > 1 else ""
    name = " ".join(worst.name.split())
    return (
        f'WARNING: a good answer is lost: prompt {worst.number}, "{name}", {last}, is in none of the last '
        f"{worst.mode.missed} completions, where a tenth of its mass at the optimum ({worst.optimum:.3f}) would give "
        f"it {expected:.1f} times{more} ({FILE})"
    )
