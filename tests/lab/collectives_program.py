"""A hand-made program on 8 simulated devices; prints its collectives as JSON. Its own process."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mara_jax.lab import chips, hlo

chips.simulate(chips.parse("cpu:8"))
mesh = jax.make_mesh((4, 2), ("rows", "more"), axis_types=(AxisType.Auto,) * 2)


def placed(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def chain(x, w):
    """Five matmuls by kernels that are cut where the rows are, then a sum over all rows."""

    def layer(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, PartitionSpec("rows"))), None

    return jnp.sum(jax.lax.scan(layer, x, w)[0], axis=0)


x, w = placed((1024, 64), "rows"), placed((5, 64, 64), None, "rows")
text = jax.jit(chain).lower(x, w).compile().as_text()
print(json.dumps([one._asdict() for one in hlo.collectives(text)]))
