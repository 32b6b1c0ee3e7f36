"""One training step by itself, as the loop makes it, for programs and tests that look between two steps."""

import time

from mara_jax.sampling import rollout
from mara_jax.train import loop, step_log
from mara_jax.train.startup import Setup
from mara_jax.train.state import State


def train_step(setup: Setup, state: State, done: int) -> tuple[State, dict]:
    """The state after the step that follows `done` steps, and the step's row."""
    started = time.perf_counter()
    ids = loop.prompt_ids(setup.cfg, len(setup.prompts), done)
    key = loop.rollout_key(setup.cfg, "rollout", done)
    completions = rollout.collect(loop.start_rollout(setup, loop.policy_params(setup, state), ids, key))
    sampled = time.perf_counter()
    batches = loop.scored_batches(setup, completions, ids, done)
    scored = time.perf_counter()
    state, scalars = loop.update(setup, state, batches)
    reward, answer = batches.policy.reward, batches.policy.answer
    step = step_log.Step(done + 1, completions, reward, answer, scalars, started, sampled, scored)
    return state, step_log.fetch(setup, step)[0]
