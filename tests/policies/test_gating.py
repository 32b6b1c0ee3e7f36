"""The gated feed-forward's own gradient: jax's numbers, and two kept arrays of its width instead of five."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.policies import gating

ROWS, WIDTH, INNER, LAYERS = 256, 16, 512, 6


def plain(gate, up, kernel_fd):
    return (jax.nn.silu(gate) * up) @ kernel_fd


def drawn(*shapes):
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("leading", [(7,), (2, 3)])
def test_values_and_gradients_are_those_of_jax(leading):
    gate, up, kernel_fd, weight = drawn((*leading, 12), (*leading, 12), (12, 5), (*leading, 5))
    gate = gate.at[..., 0].set(-100.0)  # the sigmoid's far ends
    gate = gate.at[..., 1].set(100.0)

    def run(of):
        value = lambda *args: jnp.sum(of(*args) * weight)  # noqa: E731
        return jax.value_and_grad(value, argnums=(0, 1, 2))(gate, up, kernel_fd)

    for ours, theirs in zip(*map(jax.tree.leaves, (run(gating.matmul), run(plain))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


def kept_arrays(of) -> float:
    """Temporary memory of a stack's gradient, in arrays of the feed-forward's width a layer."""

    def loss(layers, x):
        for gate_df, up_df, down_fd in layers:
            x = x + of(x @ gate_df, x @ up_df, down_fd)
        return jnp.sum(x * x)

    kernels = [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    layers = [[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in kernels] for _ in range(LAYERS)]
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(layers, x).compile().memory_analysis()
    return memory.temp_size_in_bytes / (4 * ROWS * INNER * LAYERS)


def test_gate_and_up_alone_wait_for_the_backward_pass():
    # Beside the two of every layer a few of the layer that is at work, and narrow ones.
    assert kept_arrays(plain) > 4
    assert kept_arrays(gating.matmul) < 3
