"""The norm's own gradient against jax's of the definition, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.policies import norms, products

EPS = 0.3  # large, so that forgetting it shows


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def plain(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPS) * scale


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


@pytest.mark.parametrize("leading", [(7,), (2, 3, 4)])
def test_values_and_gradients_are_those_of_the_definition(float64, leading):
    x, scale, kernels = drawn(*leading, 6), drawn(6), (drawn(6, 5), drawn(6, 3))

    def ours(x, scale, kernels):
        normed = norms.remade(x, scale, EPS)
        return normed.array, [products.matmul(normed, kernel) for kernel in kernels]

    def definition(x, scale, kernels):
        y = plain(x, scale)
        return y, [y @ kernel for kernel in kernels]

    def loss(of):
        return lambda *args: sum(jnp.sum(jnp.sin(out) * drawn(*out.shape)) for out in jax.tree.leaves(of(*args)))

    runs = (jax.value_and_grad(loss(of), (0, 1, 2))(x, scale, kernels) for of in (ours, definition))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), *runs)


def test_narrow_rows_are_normed_in_float32():
    # Squares of 300 and their sum are no bfloat16 numbers, the normed row is.
    x, scale = jnp.array([300.0, -300.0, 300.0, 300.0], jnp.bfloat16), jnp.full(4, 2.0, jnp.bfloat16)
    d_x, d_scale = jax.grad(lambda x, scale: jnp.sum(norms.remade(x, scale, 0.0).array), (0, 1))(x, scale)
    np.testing.assert_array_equal(norms.remade(x, scale, 0.0).array, [2, -2, 2, 2])
    assert d_x.dtype == d_scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(d_scale, [1, -1, 1, 1])
    # 2 (g - u mean(g u)) / 300 with u = (1, -1, 1, 1) and g all ones.
    np.testing.assert_allclose(d_x.astype(float), np.array([0.5, 1.5, 0.5, 0.5]) * 2 / 300, rtol=4e-3)
