"""The row of metrics.jsonl of each step, fetched while the device already samples for the next one."""

import collections
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mara_jax.config import LanguageRun
from mara_jax.core import diversity
from mara_jax.parallel import hosts
from mara_jax.sampling import Rollout
from mara_jax.sampling.logprobs import Hidden
from mara_jax.sampling.rollout import whole_text
from mara_jax.train import group_metrics, metrics, reference, watchdog
from mara_jax.train.guard import Guard
from mara_jax.train.mode_ledger import COUNTS, GOOD, ModeLedger
from mara_jax.train.rollouts import Rollouts
from mara_jax.train.scoring import GroupScores
from mara_jax.train.setup import Setup
from mara_jax.train.state import State
from mara_jax.train.step import REF_LOGP
from mara_jax.train.trackers import Trackers
from mara_jax.train.warnings import Warnings, threshold_of


class Step(NamedTuple):
    """A step whose update is dispatched: what its row is made of.

    number: from 1; ids [p] of its prompts; scores of the policy's completions; metrics: scalars of the update, on the
    device; started, sampled, scored: clock (s) when the step began, had its completions, and had their scores; ended:
    when its update ended, where that is known.
    """

    number: int
    ids: np.ndarray
    rollout: Rollout
    scores: GroupScores
    metrics: Mapping[str, Any]
    started: float
    sampled: float
    scored: float
    ended: float | None = None


class StepLog:
    """Writes and shows the steps of a run."""

    def __init__(
        self,
        setup: Setup,
        file: metrics.Log,
        rollouts: Rollouts,
        display: metrics.Display,
        guard: Guard,
        trackers: Trackers,
        ledger: ModeLedger,
    ) -> None:
        self.setup, self.file, self.rollouts, self.display, self.guard = setup, file, rollouts, display, guard
        self.trackers, self.ledger = trackers, ledger
        self.warnings = Warnings(setup.cfg, setup.task)
        self.window = collections.deque((row[COUNTS] for row in file.rows), maxlen=diversity.WINDOW)
        self.log_optimum: dict[int, list[float] | None] = {}  # of prompts, as they are needed

    def write(self, step: Step, to_save: tuple[State, Hidden] | None = None) -> float:
        """Waits for a step's update, then writes and shows its row; returns the clock when the update ended.

        to_save: where a checkpoint follows, the state after the step, and its policy's hidden states at completions.

        Raises:
          NonFiniteError: see `guard.Guard`; the row is not written.
        """
        watchdog.entered(f"update of step {step.number}")
        row, ended = fetch(self.setup.cfg, step)
        skipped = self.guard.check_row(row, step.ids, step.rollout, step.scores)
        if to_save is not None:
            self.guard.check_saved(step.number, *to_save)
        self.window.append(row[COUNTS])
        counts = group_metrics.pooled(self.window)
        row |= group_metrics.of_window(counts) | self._gaps(counts)
        answers = reference.common_answers(self.setup.task)
        if answers is not None:
            total = group_metrics.summed(row[COUNTS])
            row["answers/counts"] = [total.get(group_metrics.short(name), 0) for name in answers]
        of_modes, lost = self.ledger.update(row, to_save is not None)
        row |= of_modes
        self.file.write(row)
        self.trackers.write(row)
        if self.setup.cfg.rollout.save:  # the same on every process, as all of them gather
            self.rollouts.write(step.number, step.ids, *_completions(self.setup, step))
        self.display.step(row, _shown(self.setup.cfg, step, threshold_of(self.setup.cfg, row)))
        for warning in filter(None, [skipped, lost, *self.warnings.of_step(row, step.ids, step.scores.reward)]):
            self.display.note(warning)
        return ended

    def _gaps(self, counts: dict[int, dict[str | None, int]]) -> dict[str, float]:
        """Distances to the optimum and to equal shares, meant over the window's prompts with a declared answer set."""
        gaps = []
        for number, counted in counts.items():
            answers = self.setup.task.answer_set(number)
            if answers is None:
                continue
            if number not in self.log_optimum:
                self.log_optimum[number] = self._log_optimum(number, answers)
            log_optimum = self.log_optimum[number]
            if log_optimum is not None:
                names = (*map(group_metrics.short, answers), None)
                gaps.append(diversity.gap([counted.get(name, 0) for name in names], log_optimum))
        return {f"gap/{name}": float(np.mean([gap[name] for gap in gaps])) for name in gaps[0]} if gaps else {}

    def _log_optimum(self, number: int, answers: tuple[str, ...]) -> list[float] | None:
        """Of a prompt whose reference samples were drawn; None for another."""
        store, algorithm = self.setup.ref_samples, self.setup.cfg.algorithm
        if store is None or number not in store.known:
            return None
        return reference.log_optimum(algorithm, store.known[number], answers, self.setup.task)


def fetch(cfg: LanguageRun, step: Step) -> tuple[dict[str, Any], float]:
    """Waits for a step's update: its row, and the clock when the update ended."""
    scalars = {name: float(value) for name, value in step.metrics.items() if name != REF_LOGP}
    row: dict[str, Any] = {"step": step.number} | scalars
    ended = time.perf_counter() if step.ended is None else step.ended
    completions = step.rollout
    tokens, lengths, finished = (
        hosts.gather(x) for x in (completions.tokens, completions.lengths, completions.finished)
    )
    row |= group_metrics.of_step(step.scores, tokens, lengths, finished) | {
        COUNTS: group_metrics.by_prompt(step.ids, step.scores.answer),
        GOOD: group_metrics.good_by_prompt(step.ids, step.scores.answer, step.scores.reward, cfg.algorithm.threshold),
        "samples": int(lengths.size),
        "tokens/generated": int(np.sum(lengths)),
        "sampler/logp_gap": _logp_gap(completions, row["logp/mean"]),
        "time/rollout_s": step.sampled - step.started,
        "time/reward_s": step.scored - step.sampled,
        "time/update_s": ended - step.scored,
        "time/step_s": ended - step.started,
    }
    return row, ended


def _completions(setup: Setup, step: Step) -> tuple[list[list[str]], GroupScores, dict[str, np.ndarray]]:
    """What `Rollouts` writes of a step, on every process."""
    logp_pgt, ref_logp_pg, finished_pg = (
        hosts.gather(x) for x in (step.rollout.logp, step.metrics[REF_LOGP], step.rollout.finished)
    )
    logp_pg = np.sum(logp_pgt, axis=-1, dtype=np.float32)
    columns = {"logp": logp_pg, "ref_logp": ref_logp_pg.astype(np.float32), "finished": finished_pg}
    return whole_text(setup.policy, step.rollout), step.scores, columns


def _shown(cfg: LanguageRun, step: Step, threshold: float) -> list[tuple[str, bool]]:
    """Some of a step's completions, behind the number of the prompt where there are several, each with its success."""
    texts = [
        f"[{number}] {text}" if len(step.ids) > 1 else text
        for number, group in zip(step.ids, step.rollout.text, strict=True)
        for text in group
    ][: cfg.show_samples]
    good = (step.scores.reward >= threshold).ravel()[: cfg.show_samples]
    return list(zip(texts, good.tolist(), strict=True))


def _logp_gap(rollout: Rollout, trained: float) -> float:
    """Mean difference of the sampler's and the trainer's sequence log-probs: 0 but for rounding."""
    return float(np.mean(np.sum(hosts.gather(rollout.logp), axis=-1))) - trained
