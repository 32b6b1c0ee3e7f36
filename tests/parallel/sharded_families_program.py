"""One model of each given family beside itself on 8 simulated devices: python sharded_families_program.py FAMILY ...

Prints, by family and layout, the largest difference of hidden states, sampled log-probs and gradients (relative to the
largest gradient), and whether the same tokens were sampled; float64, as its own process.
"""

import json
import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.parallel import mesh, sharding
from mara_jax.policies import parameters, transformer
from mara_jax.policies.parameters import Architecture
from mara_jax.policies.policy import Policy
from mara_jax.sampling import sample

SIZES: dict[str, Any] = dict(vocab_size=64, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48)
# Heads, and queries' norm over all of them, in 2 parts and in 4; of the two key-value heads each device has both then.
LAYOUTS = (((2, 2, 2), ""), ((1, 2, 4), "kv_heads:none"))
random = np.random.default_rng(0)
PROMPTS = random.integers(4, 64, (4, 5))
COMPLETIONS = jnp.asarray(random.integers(4, 64, (8, 3)))
LENGTHS = jnp.array([5, 2, 3, 4])
POSITIONS = jnp.repeat(LENGTHS, 2)[:, None] + jnp.arange(3)
TURN = jnp.asarray(random.normal(size=(8, 3, 32)))


def loss(params, arch):
    hidden_btd = transformer.forward_group(arch, params, jnp.asarray(PROMPTS), LENGTHS, COMPLETIONS, POSITIONS)[1]
    return jnp.sum(TURN * hidden_btd), hidden_btd


def results(arch: Architecture, params) -> dict:
    (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, arch)
    policy, prompts = Policy(arch, None, (1,), 0, {}, "made here"), PROMPTS.tolist()
    rollout = sample(policy, params, prompts, key=jax.random.key(3), group_size=2, max_new_tokens=4)
    return jax.tree.map(
        np.asarray, {"hidden": hidden, "gradient": gradient, "logp": rollout.logp, "tokens": rollout.tokens}
    )


def random_params(arch: Architecture):
    """Numbers other than those of init: no bias is zero and no scale one, so that none can be lost unnoticed."""
    tree: dict = {}
    for path, (shape, _) in parameters.leaf_shapes(arch).items():
        parameters.put(tree, path, jnp.asarray((path[-1] == "scale") + 0.3 * random.normal(size=shape)))
    return tree


def differences(family: str) -> dict:
    arch, by_layout = Architecture(family, **SIZES, compute_dtype="float64"), {}
    params = random_params(arch)
    alone = results(arch, params)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone["gradient"]))
    for sizes, overrides in LAYOUTS:
        layout = sharding.layout(mesh.make_mesh(dict(zip(mesh.AXES, sizes, strict=True))), overrides)
        with sharding.use(layout):
            spread = results(arch, jax.device_put(params, parameters.shardings(arch, layout)))
        apart = jax.tree.map(lambda one, other: float(np.abs(one - other).max()), spread, alone)
        apart["gradient"] = max(jax.tree.leaves(apart["gradient"])) / largest
        by_layout["x".join(map(str, sizes))] = apart
    return by_layout


print(json.dumps({family: differences(family) for family in sys.argv[1:]}))
