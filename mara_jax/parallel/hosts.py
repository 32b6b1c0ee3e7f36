"""What several processes agree on: who writes, what one of them read, whether all of them succeeded.

Every process runs the same program, so each of these functions is called by all of them, in the same order.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mara_jax.parallel import sharding

REFUSALS = (ValueError, OSError)  # what is told in one line


class Agreed(ValueError):
    """A refusal that every process knows of, so that all of them end in order; its first process tells why."""


class Elsewhere(Agreed):
    """Another process refused, and tells why."""


def several() -> bool:
    """Whether the run has more than one process."""
    # Asking jax for the count starts its backends, before which a lone process may still choose its devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def writes() -> bool:
    """Whether this process writes logs and files: the first one does."""
    return not several() or jax.process_index() == 0


def gather(array: Any) -> np.ndarray:
    """The whole of an array on every host."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def own(array: Any) -> np.ndarray:
    """An array on the host, with zeros where other processes hold it; nothing is sent."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    host = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host


def owned(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Which entries of an array this process holds: bool, of `shape`."""
    mask = np.zeros(shape, bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        mask[index] = True
    return mask


def mine(array: Any) -> np.ndarray:
    """Which entries of an array this process holds: bool, of its shape."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.ones(array.shape, bool)
    return owned(array.sharding, array.shape)


def place(array: Any, where: jax.sharding.Sharding) -> jax.Array:
    """An array of all processes from one on each host, of which only the part that `owned` names is read."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def whole(array: Any) -> Any:
    """A host array, equal on all processes, on every device of the layout in use."""
    layout = sharding.current()
    return jnp.asarray(array) if layout is None else place(array, sharding.replicated(layout))


def rows(array: Any, axis: int = 0) -> Any:
    """A host array whose `axis` counts rows, or streams of them, on the devices of its rows, in the layout in use."""
    layout = sharding.current()
    return jnp.asarray(array) if layout is None else place(array, sharding.named(layout, (*(None,) * axis, "rows")))


def prompts(array_p: Any, samples: int) -> Any:
    """A host array [p, ...] on the devices that hold the rows of these prompts, `samples` each, in the layout in use.

    Each process needs to know the entries of its own prompts alone.
    """
    layout = sharding.current()
    if layout is None:
        return jnp.asarray(array_p)
    return place(array_p, sharding.rows_named(layout, len(array_p), samples)[0])


def groups(array_pg: Any) -> Any:
    """A host array [p, g, ...] on the devices that hold these rows in the layout in use; as `prompts`."""
    layout = sharding.current()
    if layout is None:
        return jnp.asarray(array_pg)
    return place(array_pg, sharding.rows_named(layout, *array_pg.shape[:2])[1])


def first(function: Callable[[], Any]) -> Any:
    """What `function`, called by process 0 alone, returns (JSON), on every process.

    Raises:
      Agreed: it refused there; every process then raises.
    """
    if not several():
        return function()
    value, error = None, None
    if writes():
        value, error = _caught(function)
    said = _broadcast(json.dumps([error is not None, value]) if writes() else "")
    refused, value = json.loads(said)
    if error is not None:
        raise Agreed(str(error)) from error
    if refused:
        raise Elsewhere("process 0 refused")
    return value


def everywhere(function: Callable[[], Any]) -> Any:
    """What `function` returns, unless it refuses on any process: then every process raises.

    Raises:
      Agreed: with the error of the first process that refused; its other processes raise `Elsewhere`.
    """
    if not several():
        return function()
    value, error = _caught(function)
    refused = np.asarray(multihost_utils.process_allgather(np.int32(error is not None)))
    if not refused.any():
        return value
    # One of those that refused tells it: many processes often meet one and the same obstacle.
    teller = int(np.argmax(refused))
    if teller == jax.process_index():
        raise Agreed(str(error)) from error
    raise Elsewhere(f"process {teller} refused") from error


def _caught(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except REFUSALS as error:
        return None, error


def _broadcast(text: str) -> str:
    """Process 0's text on every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    array = np.zeros(size, np.uint8)
    if writes():
        array[:] = np.frombuffer(text.encode(), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(array)).tobytes().decode()


def wait(name: str) -> None:
    """Goes on once every process is here, so that one may read what another wrote before."""
    if several():
        multihost_utils.sync_global_devices(name)


def abandon(status: int) -> NoReturn:
    """Ends this process at once, after an error that the others do not know of: they then end as well.

    A usual exit would wait for the others, which wait for this one in the middle of a computation.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
