"""Two programs on 8 simulated devices, a hand-made one and the head's gradient; prints their collectives as JSON."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mara_jax.parallel import mesh as meshes
from mara_jax.parallel import sharding
from mara_jax.plan import chips, hlo
from mara_jax.policies.parameters import Architecture
from mara_jax.sampling import head

chips.simulate(chips.parse("cpu:8"))
mesh = jax.make_mesh((4, 2), ("rows", "more"), axis_types=(AxisType.Auto,) * 2)


def placed(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def chain(x, w):
    """Five matmuls by kernels that are cut where the rows are, then a sum over all rows."""

    def layer(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, PartitionSpec("rows"))), None

    return jnp.sum(jax.lax.scan(layer, x, w)[0], axis=0)


def head_gradient(rows, hidden, tokens):
    """Of 4 chunks of 8 positions in each of 8 streams."""
    loss = lambda rows: jnp.sum(head.token_stats(ARCH, {"embed": {"embedding": rows}}, hidden, tokens, streams=8).logp)  # noqa: E731
    return sharding.constrain(jax.grad(loss)(rows), "vocab", "embed")


def exchanged(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return [one._asdict() for one in hlo.collectives(text)]


found = {"chain": exchanged(chain, placed((1024, 64), "rows"), placed((5, 64, 64), None, "rows"))}

ARCH = Architecture("qwen2", vocab_size=512, embed=64, layers=1, heads=2, kv_heads=1, head_dim=32, mlp=64)
head.MAX_LOGITS = dict.fromkeys(head.MAX_LOGITS, 512 * 8)
layout = sharding.layout(meshes.make_mesh({"data": 1, "fsdp": 8, "tensor": 1}))


def named(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named_sharding(layout, axes))


with sharding.use(layout):
    arrays = (named((512, 64), jnp.float32, "vocab", "embed"), named((8, 32, 64), jnp.float32, "rows"))
    found["head"] = exchanged(head_gradient, *arrays, named((8, 32), jnp.int32, "rows"))
print(json.dumps(found))
