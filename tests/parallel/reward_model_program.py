"""A reward model on one device and on 8 simulated ones: python reward_model_program.py DIR.

Prints a JSON object for each layout: the scores of some rows, the loss of two training steps, and the share of its
parameters that the first device holds.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import numpy as np

from mara_jax.config import Optimiser
from mara_jax.parallel import hosts, mesh, sharding
from mara_jax.tasks.base import LearnedReward
from mara_jax.train import optim, placement, preference, reward_model


def computed(where: str, sizes: list[int] | None) -> dict:
    layout = None if sizes is None else sharding.layout(mesh.make_mesh(dict(zip(mesh.AXES, sizes, strict=True))))
    rows = [list(range(3, 5 + (5 * number) % 40)) for number in range(16)]
    with sharding.use(layout):
        model = reward_model.loaded(LearnedReward(where))
        arch, tx = model.policy.architecture, optim.make(Optimiser(learning_rate=1e-2))
        state, losses = placement.fresh(arch, model.params, tx), []
        arrays = [hosts.shard_rows(array) for array in reward_model.padded(rows, 16, 64)]
        for _ in range(2):
            state, metrics = preference.update(state, *arrays, arch=arch, tx=tx)
            losses.append(float(metrics["pairs/loss"]))
        leaves = jax.tree.leaves(model.params)
        held = sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)
        after = reward_model.RewardModel(model.policy, state.params).scores(rows[:5])
        scores = model.scores(rows[:5]).tolist()
    return {"scores": scores, "losses": losses, "after": np.asarray(after).tolist(), "held": held}


if __name__ == "__main__":
    for layout in (None, [8, 1, 1], [2, 2, 2]):
        print(json.dumps(computed(sys.argv[1], layout)))
