"""The gated activation of the feed-forward (SwiGLU, Shazeer 2020)."""

import jax

from mara_jax.policies.ops.matmul import matmul


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise."""
    return jax.nn.silu(gate) * up


def swiglu_matmul(gate: jax.Array, up: jax.Array, kernel_fd: jax.Array) -> jax.Array:
    """swiglu of gate and up, both [..., f], by a kernel [f, d]: [..., d]."""
    return matmul(swiglu(gate, up), kernel_fd)
