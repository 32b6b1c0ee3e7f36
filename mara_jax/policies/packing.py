"""Rows of different lengths laid end to end in streams of tokens, so that padding costs no matmul.

A stream holds the counted positions of its own rows, row after row. With several streams (one a device shard) each
holds the rows of its shard alone, so that packing moves nothing between devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Packing(NamedTuple):
    """Where each counted position of padded rows [b, t] lies in streams [c, n], and back.

    slot_bt: int32 [b, t], the slot in its row's stream, -1 where the position does not count.
    place_cn: int32 [c, n], row * t + time, the row counted within the stream, -1 where the slot is empty.
    """

    slot_bt: jax.Array | np.ndarray
    place_cn: jax.Array | np.ndarray


def pack_lengths(
    lengths_b: Sequence[int] | np.ndarray, width: int, *, streams: int = 1, slots: int | None = None
) -> Packing:
    """The packing of rows whose first `lengths` positions count; numpy arrays, made on the host.

    Args:
      lengths_b: counted positions of each row, at most `width`.
      width: positions of a padded row.
      streams: stream i holds the i-th part of the rows, in order.
      slots: of each stream; as many as the fullest one needs unless told.

    Raises:
      ValueError: rows that do not divide over the streams, or more counted positions than slots.
    """
    lengths = np.asarray(lengths_b, np.int32)
    if lengths.size % streams:
        raise ValueError(f"{lengths.size} rows do not divide over {streams} streams: change the group or the mesh")
    counted_crt = np.arange(width) < lengths.reshape(streams, -1, 1)
    counted_cx = counted_crt.reshape(streams, -1)
    most = max(1, int(counted_cx.sum(-1).max(initial=0)))
    slots = most if slots is None else slots
    if most > slots:
        raise ValueError(f"{most} counted positions do not fit {slots} slots: give at least {most}")
    slot_cx = np.where(counted_cx, np.cumsum(counted_cx, axis=-1) - 1, -1)
    place_cn = np.full((streams, slots), -1, np.int32)
    for places, counted in zip(place_cn, counted_cx, strict=True):
        counted_x = np.flatnonzero(counted)
        places[: counted_x.size] = counted_x
    return Packing(slot_cx.reshape(-1, width).astype(np.int32), place_cn)


def bucket_size(lengths_b: Sequence[int] | np.ndarray, width: int, buckets: int, *, streams: int = 1) -> int:
    """Slots of each stream: the least of `buckets` equal fractions of the padded size that hold the counted positions.

    Few sizes mean few compilations. Same arguments as `pack_lengths`.
    """
    lengths = np.asarray(lengths_b).reshape(streams, -1)
    most, whole = int(lengths.sum(-1).max(initial=0)), lengths.shape[1] * width
    return next(size for size in bucket_sizes(whole, buckets) if size >= most)


def bucket_sizes(whole: int, buckets: int) -> list[int]:
    """All sizes that `bucket_size` can give for a padded size of `whole` positions, ascending."""
    return sorted({max(1, -(-whole * i // buckets)) for i in range(1, buckets + 1)})


def pack(x_bt: jax.Array, packing: Packing) -> jax.Array:
    """The counted positions of x [b, t, ...] as streams [c, n, ...]; empty slots hold zeros."""
    return _take(x_bt, packing.place_cn, packing.slot_bt)


@jax.custom_vjp
def pack_only(x_bt: jax.Array, packing: Packing) -> jax.Array:
    """As `pack`, but empty slots hold some position of x: finite where x is, otherwise arbitrary.

    For what weighs nothing there. Whatever gradient comes back from an empty slot is dropped.
    """
    return _read(x_bt, packing.place_cn)


pack_only.defvjp(
    lambda x, packing: (_read(x, packing.place_cn), packing), lambda packing, g: (unpack(g, packing), None)
)


def unpack(x_cn: jax.Array, packing: Packing) -> jax.Array:
    """Streams [c, n, ...] as padded rows [b, t, ...]; positions that do not count hold zeros."""
    return _take(x_cn, packing.slot_bt, packing.place_cn)


@jax.custom_vjp
def _take(x: jax.Array, at: Any, back: Any) -> jax.Array:
    """x [i, j, ...] read, stream by stream, at flat positions `at` [k, l]; zero where `at` is negative.

    Each counted position is read exactly once, so the transpose is a read at `back` [i, j], not a scatter.
    """
    return jnp.where((at >= 0).reshape(*at.shape, *(1,) * (x.ndim - 2)), _read(x, at), 0)


def _read(x, at):
    streams = min(at.shape[0], x.shape[0])
    flat, index = x.reshape(streams, -1, *x.shape[2:]), at.reshape(streams, -1)
    read = jax.vmap(lambda rows, i: rows.at[i].get(mode="promise_in_bounds"))(flat, jnp.maximum(index, 0))
    return read.reshape(*at.shape, *x.shape[2:])


def _take_fwd(x, at, back):
    return _take(x, at, back), (at, back)


def _take_bwd(saved, g):
    at, back = saved
    return _take(g, back, at), None, None


_take.defvjp(_take_fwd, _take_bwd)
