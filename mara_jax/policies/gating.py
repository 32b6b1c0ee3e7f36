"""The gated feed-forward's product by a kernel, with a gradient that keeps nothing elementwise.

jax's own rule keeps five arrays of the feed-forward's width in every layer: gate, up, the sigmoid, silu(gate) and the
product. Three of them are elementwise in the other two and are made anew where the backward pass needs them.
"""

import jax

from mara_jax.policies import products


@jax.custom_vjp
def matmul(gate: jax.Array, up: jax.Array, kernel_fd: jax.Array) -> jax.Array:
    """silu(gate) * up, both [..., f], by a kernel [f, d]: [..., d]."""
    return products.matmul(jax.nn.silu(gate) * up, kernel_fd)


def _matmul_fwd(gate, up, kernel_fd):
    return matmul(gate, up, kernel_fd), (gate, up, kernel_fd)


def _matmul_bwd(saved, g):
    gate, up, kernel_fd = saved
    d_product = jax.lax.dot_general(g, kernel_fd, (((g.ndim - 1,), (1,)), ((), ())))
    sigmoid = jax.nn.sigmoid(products.after(gate, d_product))
    silu = gate * sigmoid
    d_kernel_fd = products.over_rows(silu * up, g)
    # All three or none: XLA for GPUs would go on to what gate and up are made of first, and keep the product for it.
    return jax.lax.optimization_barrier(
        (d_product * up * (sigmoid + silu * (1 - sigmoid)), d_product * silu, d_kernel_fd)
    )


matmul.defvjp(_matmul_fwd, _matmul_bwd)
