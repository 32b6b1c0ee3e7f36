"""Compiles the attention kernels for a topology that is not here; prints bytes of a device, case by case."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mara_jax.parallel import mesh, sharding
from mara_jax.plan import chips
from mara_jax.policies.ops import pallas
from mara_jax.policies.ops.attention import Mask, causal_mask


def compiled(layout, devices: int, heads: int, t: int):
    """16 rows of 8 x t queries on each device, behind two prompts; and the bytes of their scores in float32."""
    b, k, m, s, p = 16 * devices, 2, 4, 64, 2 * devices

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(layout.mesh, PartitionSpec("fsdp")))

    def loss(q, own, prefix, counts, lengths):
        mask = Mask(causal_mask(t, m), lengths_b=counts, prefix_lengths_p=lengths)
        return jnp.sum(pallas.attention(q, own, prefix, mask).astype(jnp.float32))

    args = (of(b, k, m * t, heads), (of(b, k, t, heads),) * 2, (of(p, k, s, heads),) * 2)
    ints = (of(b, dtype=jnp.int32), of(p, dtype=jnp.int32))
    with sharding.use(layout):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args, *ints).compile(), 16 * k * m * t * t * 4


if __name__ == "__main__":
    topology = chips.parse(sys.argv[1])
    chips.simulate(topology)
    devices = np.array(chips.devices(topology))
    for heads, t in ((64, 511), (128, 511), (128, 4095)):
        program, scores = compiled(sharding.layout(Mesh(devices.reshape(1, -1, 1), mesh.AXES)), devices.size, heads, t)
        print(program.memory_analysis().temp_size_in_bytes, scores)
