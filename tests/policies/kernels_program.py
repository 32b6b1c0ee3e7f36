"""The attention kernels on four simulated devices, rows and heads cut in several ways, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mara_jax.parallel import mesh, sharding
from mara_jax.policies.ops import pallas
from mara_jax.policies.ops.attention import Mask, causal_mask

P, G, M, T, S, H = 2, 2, 2, 16, 5, 8


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(layout, p, g, k):
    q, own = drawn(0, p * g, k, M * T, H), (drawn(1, p * g, k, T, H), drawn(2, p * g, k, T, H))
    prefix = (drawn(3, p, k, S, H), drawn(4, p, k, S, H))
    counts, lengths = jnp.array([16, 1, 9, 16])[: p * g], jnp.array([5, 3])[:p]

    def loss(q, own, prefix):
        mask = Mask(causal_mask(T, M), lengths_b=counts, prefix_lengths_p=lengths)
        out = pallas.attention(q, own, prefix, mask)
        counted = jnp.tile(jnp.arange(T) < counts[:, None], (1, M))[:, None, :, None]
        return jnp.sum(jnp.sin(jnp.where(counted, out, 0)))

    with sharding.use(layout):
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, own, prefix)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    for shape, p, g, k in (((2, 1, 2), 2, 2, 2), ((1, 4, 1), 1, 4, 2), ((1, 2, 2), 2, 2, 1)):
        layout = sharding.layout(Mesh(np.array(jax.devices()).reshape(shape), mesh.AXES))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            gradients(layout, p, g, k),
            gradients(None, p, g, k),
        )
        print("equal on", *shape)
