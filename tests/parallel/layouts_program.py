"""The same run on one device and on 8 simulated ones, as its own process: python layouts_program.py ARGUMENTS OUT.

ARGUMENTS (JSON): weights, layouts (lists of data, fsdp, tensor; null: one device), steps, fields of the config, and
nudges: seeds, each for one more run on one device, from weights changed in their last digit.
"""

import json
import os
import pathlib
import sys

import borders
import jax
import numpy as np
import single_step

from mara_jax import config
from mara_jax.parallel import hosts, mesh, sharding
from mara_jax.sampling import rollout
from mara_jax.tasks import onetwo
from mara_jax.tasks.base import Score
from mara_jax.train import optim, placement, reference, startup
from mara_jax.train.prompts import EncodedPrompts
from mara_jax.train.state import remembered

# More devices than cores: one may wait for another longer than XLA's 40 seconds.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=900 --xla_cpu_collective_timeout_seconds=900"


def add_flags(flags: str) -> None:
    """More of XLA's, before it starts; what importing mara_jax has said stays."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def cut(tree) -> list[list[int]]:
    """Bytes of a tree: of the whole, and on each device."""
    leaves = jax.tree.leaves(tree)
    here = jax.local_devices()
    held = [sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == d) for d in here]
    return [[sum(leaf.nbytes for leaf in leaves)], held]


def magnitude(leaf) -> float:
    return float(np.abs(hosts.gather(leaf).astype(np.float64)).sum())


def nudged(params, seed: int):
    """Each number up or down to its neighbour, by chance."""
    rng = np.random.default_rng(seed)

    def move(leaf):
        here = np.asarray(leaf)
        return jax.numpy.asarray(np.nextafter(here, rng.choice([-1, 1], here.shape).astype(here.dtype) * np.inf))

    return jax.tree.map(move, params)


class Graded(onetwo.OneTwo):
    """A little more reward for every character of a completion, so that few are equal."""

    max_reward = invalid_reward = None

    def score(self, prompt_index, texts, finished) -> Score:
        score = super().score(prompt_index, texts, finished)
        return Score(
            [reward + 0.01 * len(text) for reward, text in zip(score.reward, texts, strict=True)], score.answer
        )


def train(run: config.LanguageRun, sizes: list[int] | None, steps: int, at_end=lambda *_: None, nudge=None) -> dict:
    """The run's losses, tokens and log-probs at each step, and what its state weighs."""
    layout = None if sizes is None else sharding.layout(mesh.make_mesh(dict(zip(mesh.AXES, sizes, strict=True))))
    drawn, collect = [], rollout.collect
    with sharding.use(layout):
        task = Graded() if run.algorithm.threshold_percentile else onetwo.OneTwo()
        policy, ref_params = reference.load_base(run, task)
        if nudge is not None:
            ref_params = nudged(ref_params, nudge)
        tx = optim.make(run.optimiser)
        state = placement.fresh(policy.architecture, ref_params, tx, more=remembered(run, len(task)))
        weights = cut([state.params, state.opt_state])
        samples = single_step.samples_with({"1": 6, "2": 2, None: 2})
        setup = startup.Setup(run, task, policy, ref_params, EncodedPrompts(run, policy, task), tx, samples)

        def recorded(pending):
            drawn.append(collect(pending))
            return drawn[-1]

        rollout.collect, rows, snapshots = recorded, [], []
        for done in range(steps):
            snapshots.append(jax.tree.map(hosts.gather, state.params))
            state, row = single_step.train_step(setup, state, done)
            rows.append({k: v for k, v in row.items() if not k.startswith("time/")})
        rollout.collect = collect
        at_end(setup, state, snapshots)
        where = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.opt_state)} if layout else set()
    return {
        "rows": rows,
        "tokens": [hosts.gather(one.tokens).tolist() for one in drawn],
        "logp": [hosts.gather(one.logp).tolist() for one in drawn],
        "bytes_before": weights,
        "bytes_after": cut([state.params, state.opt_state]),
        "moments": sorted(where),
        "params": [
            float(np.abs(hosts.gather(leaf).astype(np.float64)).sum()) for leaf in jax.tree.leaves(state.params)
        ],
    }


def run_of(asked: dict) -> config.LanguageRun:
    """The run that weights, steps and fields describe."""
    values = config.LanguageRun(
        policy=config.Policy(weights=asked["weights"]), steps=asked["steps"], task=onetwo.Config()
    )
    values = config.to_config_dict(values)
    values.update_from_flattened_dict(asked["fields"])
    run = config.resolve(values)
    assert isinstance(run, config.LanguageRun)
    return run


def main() -> None:
    asked = json.loads(sys.argv[1])
    add_flags(f"--xla_force_host_platform_device_count=8 {PATIENCE}")
    run = run_of(asked)
    ends = []
    steps, at_end = asked["steps"], lambda *end: ends.append(end)
    found = [train(run, sizes, steps, at_end) for sizes in asked["layouts"]]
    found += [train(run, None, steps, at_end, nudge) for nudge in asked["nudges"]]
    for one, (setup, _, snapshots) in zip(found, ends, strict=True):
        key, both = reference.stream(run.seed, "rollout"), (ends[0][2], snapshots)
        one["differs"] = borders.first_difference(setup.policy, setup.prompts[0], key, found[0], one, both)
    pathlib.Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
