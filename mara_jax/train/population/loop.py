"""The training loop of members side by side: that of `loop`, for states with a leading axis of members."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax.core import method_rules
from mara_jax.parallel import stop
from mara_jax.sampling.logprobs import Hidden
from mara_jax.train import memory, metrics, watchdog
from mara_jax.train.groups import Groups, policy_params
from mara_jax.train.outputs import Outputs
from mara_jax.train.population import step as steps
from mara_jax.train.population.display import mean_row
from mara_jax.train.prompts import fitting, ids_of_step
from mara_jax.train.setup import Setup
from mara_jax.train.state import State
from mara_jax.train.step_log import Step


class Pending(NamedTuple):
    """A step of all members whose update is dispatched, and whose rows are not written yet; scalars: [k] each."""

    steps: list[Step]
    scalars: dict[str, jax.Array]


def train(
    setups: Sequence[Setup], state: State, first: int, opened: Sequence[Outputs], display: metrics.Display
) -> State:
    """Every step that is left, from `first` on, or until a signal; returns the last state, saved."""
    count, pending = setups[0].cfg.steps, None
    _look_at_first_states(setups, state, first, opened)
    for done in range(first, count):
        started = time.perf_counter()
        fits = [fitting(one.cfg, one.prompts, ids_of_step(one.cfg, len(one.prompts), done), done) for one in setups]
        ids_k = [fit.ids for fit in fits]
        watchdog.entered(f"sampling of step {done + 1}")
        drawing = steps.start_rollouts(setups, state.params, ids_k, "rollout", done)
        if pending is not None:
            started = write(pending, opened, display)  # the devices sample meanwhile
            watchdog.entered(f"sampling of step {done + 1}")
        completions_k = steps.collect(setups, drawing)
        sampled = time.perf_counter()
        watchdog.entered(f"scoring of step {done + 1}")
        scores_k, batches = steps.scored_batches(setups, drawing, completions_k, ids_k, done)
        if stop.asked():  # as in `train.loop`
            if done > first:
                _save(state, done, opened, steps.policy_hidden(setups, state.params, drawing, completions_k))
            return state
        for setup, scores in zip(setups, scores_k, strict=True):
            method_rules.check_rewards(setup.cfg.algorithm, scores.reward)
        scored = time.perf_counter()
        watchdog.entered(f"update of step {done + 1}")
        state, scalars = steps.update(setups, state, batches)
        del batches
        groups = [Groups(one, fit.ids, fit.replaced) for one, fit in zip(completions_k, fits, strict=True)]
        counts_k = [one.counts(setup.cfg) for setup, one in zip(setups, groups, strict=True)]
        rows = zip(ids_k, completions_k, scores_k, counts_k, strict=True)
        pending = Pending([Step(done + 1, *row, started, sampled, scored) for row in rows], scalars)
        last = done + 1 == count
        if opened[0].checkpoints.due(done + 1, last) or opened[0].evaluations.due(done + 1):
            hidden_k = steps.policy_hidden(setups, state.params, drawing, completions_k)
            write(pending, opened, display, (state, hidden_k))
            pending = None
            for place, (setup, outputs) in enumerate(zip(setups, opened, strict=True)):
                own_state = steps.member(state, place)
                outputs.evaluations.measure(done + 1, policy_params(setup, own_state))
                watchdog.entered(f"checkpoint after step {done + 1}")
                outputs.checkpoints.save(done + 1, own_state, last)
            memory.give_back()
    return state


def _save(state: State, step: int, opened: Sequence[Outputs], hidden_k: Hidden) -> None:
    """Saves every member after `step` steps; hidden_k: as of `write`."""
    for place, outputs in enumerate(opened):
        own_state, own_hidden = steps.member((state, hidden_k), place)
        outputs.log.guard.check_saved(step, own_state, own_hidden)
        outputs.checkpoints.save(step, own_state, last=True)


def _look_at_first_states(setups: Sequence[Setup], state: State, step: int, opened: Sequence[Outputs]) -> None:
    """Refuses states that are not finite, and makes the evaluations that belong before the first step."""
    for place, (setup, outputs) in enumerate(zip(setups, opened, strict=True)):
        own_state = steps.member(state, place)
        outputs.log.guard.check_state(step, own_state)
        outputs.evaluations.measure(step, policy_params(setup, own_state))


def write(
    pending: Pending,
    opened: Sequence[Outputs],
    display: metrics.Display,
    to_save: tuple[State, Hidden] | None = None,
) -> float:
    """Waits for the updates and writes every member's row; returns the clock when the updates ended.

    to_save: as of `StepLog.write`, with a leading axis of members.
    """
    watchdog.entered(f"update of step {pending.steps[0].number}")
    scalars: dict[str, np.ndarray] = jax.device_get(pending.scalars)
    ended, rows = time.perf_counter(), []
    for place, (outputs, step) in enumerate(zip(opened, pending.steps, strict=True)):
        values: dict[str, Any] = {name: of_all[place] for name, of_all in scalars.items()} | dict(step.metrics)
        own_part = None if to_save is None else steps.member(to_save, place)
        outputs.log.write(step._replace(metrics=values, ended=ended), own_part)
        rows.append(outputs.file.rows[-1])
    display.step(mean_row(rows), [])
    return ended
