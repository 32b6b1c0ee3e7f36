"""A checkpoint restored in one arrangement of devices and saved in the next, as one process of such:

python restored_program.py WORKDIR DATA FSDP TENSOR STEP [ADDRESS PROCESSES PROCESS]

Restores the newest checkpoint, or makes a state of random bits where there is none, saves it as STEP, and prints a
digest of every array (JSON), gathered from all devices.
"""

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
import optax
from absl import logging

from mara_jax.config import Checkpoint
from mara_jax.parallel import hosts, mesh, sharding
from mara_jax.policies import transformer
from mara_jax.train import checkpoint, placement

ARCH = transformer.Architecture("qwen2", 64, 32, 2, heads=4, kv_heads=4, head_dim=8, mlp=64)
TX = optax.adam(1e-3)


def random_bits(shape: jax.ShapeDtypeStruct, number: int) -> jax.Array:
    """An array of random finite numbers of all sizes, or of a step, in the placement of the shape."""
    bits = np.random.default_rng(number)
    values = bits.standard_normal(shape.shape) * 10.0 ** bits.integers(-30, 30, shape.shape)
    array = np.asarray(values.astype(shape.dtype) if np.issubdtype(shape.dtype, np.floating) else number)
    return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: array.astype(shape.dtype)[index])


def main(workdir: str, sizes: list[int], step: int, together: list[str]) -> None:
    logging.set_verbosity(logging.FATAL)
    if together:
        mesh.join_processes(together[0], int(together[1]), int(together[2]))
    # All devices of one process may be more than the mesh has.
    devices = jax.devices() if together else jax.devices()[: int(np.prod(sizes))]
    layout = sharding.layout(mesh.make_mesh(dict(zip(mesh.AXES, sizes, strict=True)), devices))
    with sharding.use(layout):
        shapes = placement.abstract(ARCH, TX)
        where = jax.sharding.SingleDeviceSharding(devices[0])
        shapes = jax.tree.map(
            lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding or where), shapes
        )
        checkpoints = checkpoint.Checkpoints(pathlib.Path(workdir), Checkpoint(every=1, keep=9))
        if hosts.on_process_zero(checkpoints.latest) is None:
            leaves, tree = jax.tree.flatten(shapes)
            state = jax.tree.unflatten(tree, [random_bits(leaf, number) for number, leaf in enumerate(leaves)])
        else:
            state = checkpoints.restore(shapes)
        checkpoints.save(step, state)
        checkpoints.close()
        digests = {
            jax.tree_util.keystr(path): [
                hashlib.sha256(hosts.gather(leaf).tobytes()).hexdigest(),
                len({shard.index for shard in map(_Index, leaf.addressable_shards)}),
            ]
            for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        }
    print(json.dumps(digests), flush=True)


class _Index:
    """What part of an array a shard is, to be counted."""

    def __init__(self, shard: jax.Shard) -> None:
        self.index = str(shard.index)


if __name__ == "__main__":
    main(sys.argv[1], [int(size) for size in sys.argv[2:5]], int(sys.argv[5]), sys.argv[6:])
