"""Keys and values of every layer, and the cache that decoding writes them to."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies.parameters import Architecture


@flax.struct.dataclass
class KV:
    """Keys and values. Of all layers: a tuple of [rows, k, s, h] when unrolled, one [l, rows, k, s, h] when scanned; a
    `Block` sees those of its own layer, [rows, k, s, h].

    Heads come before time so that attention's batched matmuls read them as they lie.
    """

    k: Any
    v: Any


def init_cache(arch: Architecture, rows: int, length: int) -> KV:
    """An empty KV cache: zeros in the compute dtype, with `length` slots for each of `rows` sequences."""

    def zeros():
        shape = (rows, arch.kv_heads, length, arch.head_dim)
        if arch.scan_layers:
            return sharding.constrain(jnp.zeros((arch.layers, *shape), arch.compute_dtype), None, "rows", "kv_heads")
        each = (jnp.zeros(shape, arch.compute_dtype) for _ in range(arch.layers))
        return tuple(sharding.constrain(array, "rows", "kv_heads") for array in each)

    return KV(zeros(), zeros())


def written(cache: KV, new: KV, index: jax.Array | int) -> KV:
    """One layer's cache with new keys and values from slot `index` on."""

    def write(slots, tokens):
        return jax.lax.dynamic_update_slice_in_dim(slots, tokens.astype(slots.dtype), index, axis=2)

    return KV(write(cache.k, new.k), write(cache.v, new.v))


def slot_count(kv: KV) -> int:
    """Slots of a cache, or tokens of a prefix."""
    return jax.tree.leaves(kv.k)[0].shape[-2]
