"""The sharded head and lookup beside their plain forms, on 8 simulated devices: python sharded_head_program.py.

Prints the largest difference of each result and gradient, by layout; float64, as its own process.
"""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.parallel import mesh, sharding
from mara_jax.sampling import head, sharded_head

random = np.random.default_rng(0)
V, D, B, N = 96, 16, 8, 3
rows, ref_rows = (jnp.asarray(random.normal(size=(V, D))) for _ in range(2))
hidden, ref_hidden = (jnp.asarray(random.normal(size=(B, N, D))) for _ in range(2))
WITHOUT = ((30, 43), (90, V))  # some ids have no token, whole blocks of them
tokens, g = jnp.asarray(random.integers(0, 30, (B, N))), jnp.asarray(random.normal(size=(B, N)))
turn = jnp.asarray(random.normal(size=(B, N, D)))


def results(stats, lookup) -> dict:
    """Statistics, embedded tokens, and gradients of a weighted sum of log-probs and of what was looked up."""

    def loss(rows, hidden):
        out, looked = stats(rows, hidden, tokens, (ref_rows, ref_hidden)), lookup(rows)
        return jnp.sum(out[0] * g) + jnp.sum(looked * turn), (out, looked)

    (_, (out, looked)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(rows, hidden)
    names = ("logp", "entropy", "ref_logp", "kl", "looked", "d_rows", "d_hidden")
    return dict(zip(names, (*out, looked, *grads), strict=True))


plain = results(lambda *args: head._stats(1, 1, WITHOUT, *args), lambda rows: rows[tokens])
found = {}
for sizes, blocks in (((1, 8, 1), 12), ((2, 2, 2), 4)):
    with sharding.use(sharding.layout(mesh.make_mesh(dict(zip(mesh.AXES, sizes, strict=True))))):
        cut = results(
            lambda *args, blocks=blocks: sharded_head.stats(blocks, WITHOUT, *args),
            lambda rows: sharding.embedding_lookup(rows, tokens, rows.dtype),
        )
    found["x".join(map(str, sizes))] = {name: float(jnp.max(jnp.abs(cut[name] - plain[name]))) for name in plain}
print(json.dumps(found))
