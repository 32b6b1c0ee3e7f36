"""Two steps of a population without a layout and over four simulated devices, in float64; prints how they differ."""

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from test_population import BASE, setup_of, states_of, steps_of_prompts  # noqa: E402

from mara_jax import config  # noqa: E402
from mara_jax.parallel import sharding  # noqa: E402
from mara_jax.plan import hlo  # noqa: E402
from mara_jax.train import preflight, programs  # noqa: E402
from mara_jax.train.population import programs as programs_of  # noqa: E402
from mara_jax.train.population import step as steps_of  # noqa: E402
from mara_jax.train.setup import Setup  # noqa: E402


def two_steps(setups: list[Setup]) -> Any:
    """Tokens and scalars of each step, and each member's parameters at the end, on the host."""
    state, seen = steps_of.stacked(states_of(setups)), []
    for done in range(2):
        drawing, batches = batches_of(setups, state, done)
        state, scalars = steps_of.update(setups, state, batches)
        seen.append((drawing.drawn.tokens, scalars))
    return jax.device_get((seen, [steps_of.member(state.params, k) for k in range(len(setups))]))


def batches_of(setups: list[Setup], state: Any, done: int) -> Any:
    """A step's rollouts and its batches."""
    ids_k = [steps_of_prompts(one, done) for one in setups]
    drawing = steps_of.start_rollouts(setups, state.params, ids_k, "rollout", done)
    return drawing, steps_of.scored_batches(setups, drawing, steps_of.collect(setups, drawing), ids_k, done)[1]


def collectives(setups: list[Setup]) -> list[str]:
    """Kinds of the collectives in the update."""
    first, state = setups[0], steps_of.stacked(states_of(setups))
    hyper = jax.tree.map(lambda *x: np.stack(x), *(programs.hyperparameters(one.cfg) for one in setups))
    choices = programs.static_choices(first.cfg, first.policy.architecture, first.tx)
    _, batches = batches_of(setups, state, 0)
    compiled = programs_of.update.lower(
        state, first.ref_params, batches, hyper, np.ones(len(setups)), choices
    ).compile()
    return [one.kind for one in hlo.collectives(compiled.as_text())]


def difference(one: Any, other: Any) -> float:
    """The largest absolute one between two trees of arrays."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b))) for a, b in pairs)


def of_seeds(seeds: int) -> dict[str, Any]:
    """What is printed of a population of two betas and so many seeds."""
    run = dataclasses.replace(BASE, population=config.Population(betas=(0.05, 0.5), seeds=seeds))
    setups = [setup_of(rank=3)._replace(cfg=one.run) for one in config.members(run)]
    together = two_steps(setups)
    with sharding.use(preflight.layout_of(run)):
        state = steps_of.stacked(states_of(setups))
        per_device = {leaf.addressable_shards[0].data.shape[0] for leaf in jax.tree.leaves(state)}
        apart = two_steps(setups)
        kinds = collectives(setups)
    return {"members on a device": sorted(per_device), "difference": difference(together, apart), "collectives": kinds}


print(json.dumps(of_seeds(int(sys.argv[1]))))
