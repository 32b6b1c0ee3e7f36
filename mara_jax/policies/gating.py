"""The gated feed-forward's product by a kernel, with a gradient that keeps nothing elementwise.

jax's own rule keeps five arrays of the feed-forward's width in every layer: gate, up, the sigmoid, silu(gate) and the
product. Three of them are elementwise in the other two and are made anew where the backward pass needs them.
"""

import functools

import jax

from mara_jax.policies import products


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul(gate: jax.Array, up: jax.Array, kernel_fd: jax.Array, frozen: bool = False) -> jax.Array:
    """silu(gate) * up, both [..., f], by a kernel [f, d]: [..., d]. frozen: nobody asks for the kernel's gradient."""
    return products.matmul(jax.nn.silu(gate) * up, kernel_fd)


def _matmul_fwd(gate, up, kernel_fd, frozen):
    return matmul(gate, up, kernel_fd), (gate, up, kernel_fd)


def _matmul_bwd(frozen, saved, g):
    gate, up, kernel_fd = saved
    d_product = products.by_kernel(g, kernel_fd, 1)
    # The sigmoid is made for each use where there is one CPU: it costs less there than a pass over memory to store it.
    for_kernel, for_gate, for_up = (products.after(gate, d_product, at) for at in range(3))
    d_kernel_fd = products.over_rows(jax.nn.silu(for_kernel) * up, g, after=products.first(d_product))
    if products.one_cpu() and not frozen:
        # XLA would make the other two first, and hold them beside the product.
        d_product += (0 * products.first(d_kernel_fd)).astype(d_product.dtype)
    sigmoid = jax.nn.sigmoid(for_gate)
    d_silu = sigmoid + for_gate * sigmoid * (1 - sigmoid)
    # All three or none: XLA for GPUs would go on to what gate and up are made of first, and keep the product for it.
    return jax.lax.optimization_barrier((d_product * up * d_silu, d_product * jax.nn.silu(for_up), d_kernel_fd))


matmul.defvjp(_matmul_fwd, _matmul_bwd)
