"""Looks for values that are not finite in a state over eight simulated devices; prints what it finds as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.train import finite
from mara_jax.train.state import State

MESH = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
CUT, WHOLE = (jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec(*names)) for names in (("x",), ()))


def state(bad: float | None) -> State:
    """The last device's part of a moment, and nothing else, may be bad."""
    moment = np.ones((16, 4), np.float32)
    if bad is not None:
        moment[-1, -1] = bad
    kernel = jax.device_put(jnp.ones((16, 4)), CUT)
    return State(
        jnp.int32(0),
        {"kernel": kernel, "scale": jax.device_put(jnp.ones(4), WHOLE)},
        {"mu": jax.device_put(moment, CUT)},
    )


devices: set[int] = set()
for name in ("_is_usable", "_is_finite"):
    check = getattr(finite, name)
    setattr(finite, name, lambda x, check=check: (devices.add(len(x.sharding.device_set)), check(x))[1])
found = [finite.nonfinite_array(state(bad)) for bad in (None, np.nan, np.inf)]
whole = [finite.all_finite(state(bad).opt_state) for bad in (None, -np.inf)]
print(json.dumps({"found": found, "all_finite": whole, "devices": sorted(devices)}))
