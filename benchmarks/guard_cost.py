"""CPU time of a training step with the check that its values are finite, over that of the same step without it.

  python benchmarks/guard_cost.py                  nano and small policies
  python benchmarks/guard_cost.py --repeats=100 nano

Prints one JSON object a line. A step is a rollout, its scores, the update, and its row. Three sides take turns in one
process on one thread, in changing order, and train one and the same state: without the check, with it (guard=stop), and
with updates that may be skipped (guard=skip, another compiled update). `ratio` is the CPU time of guard=stop over that
without a check, `ratio_skip` that of guard=skip: medians of the turns' quotients. `check_ms` is the check of a row
alone, `state_ms` that of parameters and moments, which each checkpoint costs.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import numpy as np

from mara_jax import config
from mara_jax.bench import phases
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.train import finite, guard, loop, step_log
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.setup import Setup
from mara_jax.train.state import State

SIZES = {"nano": (1, 32, 40), "small": (1, 8, 16)}  # prompts, completions of each, new tokens
SIDES = ("without", "stop", "skip")


def policy_of(name: str) -> Policy:
    if name != "nano":
        return phases.random_policy(name)
    arch = transformer.Architecture("qwen2", 512, 128, 2, heads=2, kv_heads=2, head_dim=64, mlp=512)
    return Policy(arch, None, (), 0, {}, name)


def step(setup: Setup, state: State, done: int, watch: guard.Guard | None) -> State:
    """One step as the loop makes it, up to where its row would be written."""
    started, ids = time.perf_counter(), np.arange(len(setup.prompts))
    completions = phases.sample_completions(setup, state.params, done)
    scores, batches = loop.scored_batches(setup, completions, ids, done)
    state, scalars = loop.update(setup, state, batches)
    row, _ = step_log.fetch(setup.cfg, step_log.Step(done, ids, completions, scores, scalars, *(started,) * 3))
    if watch is not None:
        watch.check_row(row, ids, completions, scores)
    jax.block_until_ready(state)
    return state


def measure(name: str, repeats: int, folder: pathlib.Path) -> dict:
    prompts, group, new = SIZES[name]
    policy = policy_of(name)
    params = transformer.init(policy.architecture, jax.random.key(0))
    run = phases.run_of(prompts, group, new)
    setup = phases.setup_of(run, policy, params, phases.random_prompts(policy.architecture.vocab_size, prompts, 64))
    setups = {
        side: setup._replace(cfg=dataclasses.replace(run, guard="skip")) if side == "skip" else setup for side in SIDES
    }
    checkpoints = Checkpoints(folder, config.Checkpoint())
    watches = {side: guard.Guard(setups[side], folder, [], checkpoints) for side in SIDES[1:]}
    state, seconds = phases.fresh_state(setup), {side: [] for side in SIDES}
    for turn in range(-2, repeats):
        for place in range(len(SIDES)):
            side = SIDES[(place + turn) % len(SIDES)]
            before = time.process_time()
            state = step(setups[side], state, turn + 2, watches.get(side))
            if turn >= 0:
                seconds[side].append(time.process_time() - before)
    quotients = {
        side: statistics.median(one / other for one, other in zip(seconds[side], seconds["without"], strict=True))
        for side in SIDES[1:]
    }
    row = dict.fromkeys(finite.SUMMARIES, 1.0)
    return {
        "policy": name,
        "ratio": quotients["stop"],
        "ratio_skip": quotients["skip"],
        "step_s": statistics.median(seconds["without"]),
        "check_ms": 1e3 * cpu_seconds(lambda: watches["stop"].check_row(row, None, None, None), 1000),
        "state_ms": 1e3 * cpu_seconds(lambda: finite.nonfinite_array(state), 5),
        "repeats": repeats,
    }


def cpu_seconds(call, times: int) -> float:
    """Of one call, after a first one that may compile."""
    call()
    before = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - before) / times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policies", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--repeats", type=int, default=30, help="turns of each side")
    options = parser.parse_args()
    for name in options.policies:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(name, options.repeats, pathlib.Path(folder)), allow_nan=False), flush=True)
