"""One training step by itself, as the loop makes it, for programs and tests that look between two steps."""

import time

import numpy as np

from mara_jax.sampling import rollout
from mara_jax.train import groups, loop, prompts, step_log
from mara_jax.train.reference_samples import PromptSamples, ReferenceSamples
from mara_jax.train.startup import Setup
from mara_jax.train.state import State


def samples_with(counts: dict[str | None, int]) -> ReferenceSamples:
    """Samples of the reference under prompt 0: each answer so often, rewarded with 1; None is not."""
    answers = [name for name, count in counts.items() for _ in range(count)]
    reward = np.array([float(name is not None) for name in answers], np.float32)
    store = ReferenceSamples(None, len(answers), at_once=1)
    store.add({0: PromptSamples(reward, answers, np.full(len(answers), -3.0), [""] * len(answers))})
    return store


def train_step(setup: Setup, state: State, done: int) -> tuple[State, dict]:
    """The state after the step that follows `done` steps, and the step's row."""
    started = time.perf_counter()
    ids = prompts.ids_of_step(setup.cfg, len(setup.prompts), done)
    key = groups.rollout_key(setup.cfg, "rollout", done)
    completions = rollout.collect(groups.start_rollout(setup, groups.policy_params(setup, state), ids, key))
    sampled = time.perf_counter()
    scores, batches = loop.scored_batches(setup, completions, ids, done)
    scored = time.perf_counter()
    state, scalars = loop.update(setup, state, batches)
    step = step_log.Step(done + 1, ids, completions, scores, scalars, started, sampled, scored)
    return state, step_log.fetch(setup.cfg, step)[0]
