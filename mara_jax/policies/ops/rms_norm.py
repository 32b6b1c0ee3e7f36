"""The root-mean-square norm (Zhang and Sennrich 2019)."""

import jax
import jax.numpy as jnp

from mara_jax.policies.parameters import wide


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x over the root of its mean square along the last axis, times scale; computed in float32 (or wider).

    args: x: [..., d]; scale: [d].
    returns: [..., d] in x's dtype.
    """
    x_wide = x.astype(wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(x_wide * x_wide, axis=-1, keepdims=True) + eps)
    return (x_wide * inverse * scale.astype(inverse.dtype)).astype(x.dtype)
