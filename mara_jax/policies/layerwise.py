"""A forward pass of one small program after another, for weights kept in fewer bits than they are multiplied in.

XLA:CPU multiplies bfloat16 as float32. In one program for the whole model it makes the float32 copies of all weights
first, which takes three times the weights' memory; one program a layer has no more than a layer's copies at a time.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import params as table
from mara_jax.policies import rotary, transformer
from mara_jax.policies.params import Architecture

HEAD_PARTS = 16  # at most: of a small model the head is a good part


def pays(arch: Architecture, params: Any) -> bool:
    """Whether multiplying these weights makes wider copies of them."""
    return sharding.platform() == "cpu" and transformer.head_rows(arch, params).dtype.itemsize < 4


def logits(arch: Architecture, params: Any, tokens_bt: jax.Array) -> jax.Array:
    """Next-token logits of sequences from position 0 on, as of `transformer.forward` and `transformer.logits`.

    args: arch; params: nested dict, unrolled or scanned; tokens_bt: ids.
    returns: float32 [b, t, v].
    """
    x_btd = _embedded(arch, params["embed"], tokens_bt)
    for index in range(arch.layers):
        if arch.scan_layers:
            layer = jax.tree.map(lambda leaf, at=index: leaf[at], params["layers"])
        else:
            layer = params[f"layers_{index}"]
        x_btd = _layer(arch, layer, x_btd)
    x_btd, rows_vd = _normed(arch, params["final_norm"], x_btd), transformer.head_rows(arch, params)
    size = arch.vocab_size // math.gcd(arch.vocab_size, HEAD_PARTS)
    parts = [_head(x_btd, rows_vd[at : at + size]) for at in range(0, arch.vocab_size, size)]
    return jnp.concatenate(parts, axis=-1)


@partial(jax.jit, static_argnums=0)
def _embedded(arch: Architecture, params: Any, tokens_bt: jax.Array) -> jax.Array:
    return transformer.Embedding(arch).apply({"params": params}, tokens_bt)  # pyright: ignore[reportReturnType]


@partial(jax.jit, static_argnums=0)
def _layer(arch: Architecture, params: Any, x_btd: jax.Array) -> jax.Array:
    positions_bt = jnp.broadcast_to(jnp.arange(x_btd.shape[1]), x_btd.shape[:2])
    rope, masks = rotary.angles(arch, positions_bt), transformer.masks(arch, x_btd.shape[1])
    layer: Any = transformer.Layer(arch)  # what apply returns depends on flags that type checkers cannot follow
    return layer.apply({"params": params}, x_btd, rope, masks, None, None, None)[0]


@partial(jax.jit, static_argnums=0)
def _normed(arch: Architecture, params: Any, x_btd: jax.Array) -> jax.Array:
    return transformer.Norm(arch.norm_eps).apply({"params": params}, x_btd).array  # pyright: ignore[reportAttributeAccessIssue]


@jax.jit
def _head(x_btd: jax.Array, rows_vd: jax.Array) -> jax.Array:
    wide = table.wide(x_btd.dtype)
    return jnp.einsum("btd,vd->btv", x_btd, rows_vd.astype(x_btd.dtype), preferred_element_type=wide)
