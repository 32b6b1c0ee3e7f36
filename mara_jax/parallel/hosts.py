"""Several processes: which one writes, errors that all of them raise, and global arrays from host arrays.

Every process runs the same program, so all of them call each of these functions, in the same order.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mara_jax.parallel import sharding, watch

USER_ERRORS = (ValueError, OSError)  # reported in one line, without a traceback


class SharedError(ValueError):
    """An error that every process raises, so that all of them end in order; one process reports it."""


class RemoteError(SharedError):
    """The error of another process, which reports it."""


def several_processes() -> bool:
    """Whether the run has more than one process."""
    # Asking jax for the count starts its backends, before which a lone process may still choose its devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_process_zero() -> bool:
    """Whether this process is the one that writes logs and files."""
    return not several_processes() or jax.process_index() == 0


def gather(array: Any) -> np.ndarray:
    """The whole of an array on every host."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return _all_gathered(array, tiled=True)
    return np.asarray(array)


def local_values(array: Any) -> np.ndarray:
    """An array on the host, with zeros where other processes hold it; no collective."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    host = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host


def local_mask_of(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Which entries of an array this process holds: bool, of `shape`."""
    mask = np.zeros(shape, bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        mask[index] = True
    return mask


def local_mask(array: Any) -> np.ndarray:
    """Which entries of an array this process holds: bool, of its shape."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.ones(array.shape, bool)
    return local_mask_of(array.sharding, array.shape)


def global_array(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """The global array from an array on each host, of which only the entries in `local_mask_of` are read."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicate(array: Any) -> Any:
    """A host array, equal on all processes, replicated on every device of the layout in use."""
    layout = sharding.current()
    return jnp.asarray(array) if layout is None else global_array(array, sharding.replicated(layout))


def shard_rows(array: Any, axis: int = 0) -> Any:
    """A host array whose `axis` counts rows or packed sequences, sharded along it in the layout in use."""
    layout = sharding.current()
    if layout is None:
        return jnp.asarray(array)
    return global_array(array, sharding.named_sharding(layout, (*(None,) * axis, "rows")))


def shard_prompts(array_p: Any, samples: int) -> Any:
    """A host array [p, ...] on the devices that hold these prompts' rows (`samples` each) in the layout in use.

    Each process needs the entries of its own prompts alone.
    """
    layout = sharding.current()
    if layout is None:
        return jnp.asarray(array_p)
    return global_array(array_p, sharding.row_shardings(layout, len(array_p), samples)[0])


def shard_groups(array_pg: Any) -> Any:
    """A host array [p, g, ...] on the devices that hold these rows in the layout in use; as `shard_prompts`."""
    layout = sharding.current()
    if layout is None:
        return jnp.asarray(array_pg)
    return global_array(array_pg, sharding.row_shardings(layout, *array_pg.shape[:2])[1])


def on_process_zero(function: Callable[[], Any]) -> Any:
    """Calls `function` on process 0 alone and returns its result (JSON) on every process.

    Raises:
      SharedError: it raised there; every process then raises.
    """
    if not several_processes():
        return function()
    value, error = None, None
    if is_process_zero():
        value, error = _caught(function)
    message = _broadcast(json.dumps([error is not None, value]) if is_process_zero() else "")
    failed, value = json.loads(message)
    if error is not None:
        raise SharedError(str(error)) from error
    if failed:
        raise RemoteError("process 0 failed")
    return value


def on_any_process(value: bool) -> bool:
    """Whether it is so on any process; the same answer on all of them."""
    if not several_processes():
        return value
    return bool(np.any(_all_gathered(np.int32(value))))


def raise_on_all_processes(function: Callable[[], Any]) -> Any:
    """Calls `function` on every process and returns its result; if it raises on any of them, all of them raise.

    Raises:
      SharedError: with its own error on the first process that failed; the others raise `RemoteError`.
    """
    if not several_processes():
        return function()
    value, error = _caught(function)
    failed = _all_gathered(np.int32(error is not None))
    if not failed.any():
        return value
    # One of those that failed reports it: many processes often meet one and the same obstacle.
    reporter = int(np.argmax(failed))
    if reporter == jax.process_index():
        raise SharedError(str(error)) from error
    raise RemoteError(f"process {reporter} failed") from error


def raise_as_one(error: Exception) -> NoReturn:
    """Raises an error that every process has met, of which one reports it; errors as of `raise_on_all_processes`."""

    def fail() -> NoReturn:
        raise error

    raise_on_all_processes(fail)
    raise error


def _caught(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except USER_ERRORS as error:
        return None, error


def _all_gathered(array: Any, tiled: bool = False) -> np.ndarray:
    """As `multihost_utils.process_allgather`."""
    watch.arrive()
    return np.asarray(multihost_utils.process_allgather(array, tiled=tiled))


def _broadcast(text: str) -> str:
    """Process 0's text on every process."""
    watch.arrive()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    array = np.zeros(size, np.uint8)
    if is_process_zero():
        array[:] = np.frombuffer(text.encode(), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(array)).tobytes().decode()


def gather_json(value: Any) -> list[Any]:
    """A JSON value of each process, in their order, on every process."""
    if not several_processes():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _all_gathered(np.int32(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    texts = _all_gathered(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def barrier(name: str) -> None:
    """Waits until every process is here, so that one may read what another wrote before."""
    if several_processes():
        watch.arrive()
        multihost_utils.sync_global_devices(name)
