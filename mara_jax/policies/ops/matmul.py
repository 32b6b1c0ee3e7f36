"""Products with a layer's kernel."""

from typing import Any

import jax


def matmul(x: jax.Array, kernel_df: jax.Array) -> jax.Array:
    """x [..., d] by a kernel [d, f]: [..., f] in x's dtype."""
    return jax.lax.dot_general(x, kernel_df, (((x.ndim - 1,), (0,)), ((), ())))


def matmul_transposed(x: jax.Array, kernel_fd: jax.Array, dtype: Any = None) -> jax.Array:
    """x [..., d] by a kernel stored as [f, d]: [..., f] in dtype (x's by default)."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, kernel_fd.astype(x.dtype), contract, preferred_element_type=dtype or x.dtype)
