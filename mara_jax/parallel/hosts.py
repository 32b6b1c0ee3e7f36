"""What several processes agree on: who writes, what one of them read, whether all of them succeeded.

Every process runs the same program, so each of these functions is called by all of them, in the same order.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

REFUSALS = (ValueError, OSError)  # what is told in one line


class Elsewhere(ValueError):
    """Another process refused; it tells why."""


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def writes() -> bool:
    """Whether this process writes logs and files: the first one does."""
    return jax.process_index() == 0


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


def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of all processes from one on each host, of which only the part that `owned` names is read."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def first(function: Callable[[], Any]) -> Any:
    """What `function`, called by process 0 alone, returns (JSON), on every process.

    Raises:
      ValueError: it refused there; every process then raises, process 0 its own error.
    """
    if not several():
        return function()
    value, error = None, None
    if writes():
        value, error = _caught(function)
    said = _broadcast(json.dumps([error is not None, value]) if writes() else "")
    refused, value = json.loads(said)
    if error is not None:
        raise error
    if refused:
        raise Elsewhere("process 0 refused")
    return value


def everywhere(function: Callable[[], Any]) -> Any:
    """What `function` returns, unless it refuses on any process: then every process raises.

    Raises:
      ValueError, OSError: its own error where it refused; elsewhere `Elsewhere`.
    """
    if not several():
        return function()
    value, error = _caught(function)
    refused = np.asarray(multihost_utils.process_allgather(np.int32(error is not None)))
    if error is not None:
        # One of those that refused tells it: many processes often meet one and the same obstacle.
        if int(np.argmax(refused)) != jax.process_index():
            raise Elsewhere(str(error)) from error
        raise error
    if refused.any():
        raise Elsewhere(f"process {int(np.argmax(refused))} refused")
    return value


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


def abandon() -> NoReturn:
    """Ends this process at once, after an error that the others do not know of: they then end as well.

    A usual exit would wait for the others, which wait for this one in the middle of a computation.
    """
    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
