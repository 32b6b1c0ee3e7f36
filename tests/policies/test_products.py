"""The transformer's matmul: gradients are those of a plain one, made in the kernel's own layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.bench import phases
from mara_jax.plan import work
from mara_jax.policies import products, transformer


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
def test_gradients_are_those_of_a_plain_matmul(shape):
    key = jax.random.key(0)
    x, kernel = jax.random.normal(key, shape), jax.random.normal(key, (3, 4))

    def loss(product):
        return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)))

    ours = jax.grad(loss(products.matmul), (0, 1))(x, kernel)
    plain = jax.grad(loss(jnp.matmul), (0, 1))(x, kernel)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_no_rows_have_no_gradient():
    gradient = jax.grad(lambda w: jnp.sum(products.matmul(jnp.zeros((0, 3)), w)))(jnp.ones((3, 4)))
    np.testing.assert_array_equal(gradient, np.zeros((3, 4)))
    assert not np.any(products.over_rows(jnp.zeros((0, 8)), jnp.zeros((0, 1024))))


def test_no_kernel_gradient_is_turned():
    x, kernel = jnp.ones((5, 3)), jnp.ones((3, 4))
    program = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(jnp.sin(products.matmul(x, w)))))(kernel)
    assert "transpose" not in str(program)
    assert program.out_avals[0].shape == (3, 4)


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("elementwise", 0), ("layer", 1)])
def test_remat_keeps_or_repeats_the_kernels_matmuls(remat, again):
    """By count: a name that keeps matmuls repeats none of the kernels', the other all of them but the last, `down`."""
    policy = phases.random_policy("tiny")
    policy = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, remat=remat))
    arch = policy.architecture
    case = phases.Case("case", policy, phases.random_prompts(arch.vocab_size, 4, 64), 8, 64)
    params = jax.eval_shape(lambda: transformer.init(arch, jax.random.key(0)))
    drawn, batch = phases.shapes(case, params)
    extra = phases.counted(case, params, drawn, batch).update - phases.least(case, drawn).update
    rows = 4 * (64 + 8 * 63)
    repeated = 2 * rows * (work.layer_parameters(arch) - arch.layers * arch.mlp * arch.embed)
    # Attention's own matmuls, here a tenth of the kernels', are repeated by both names, and its scores by its gradient.
    assert extra / repeated == pytest.approx(again, abs=0.25)


@pytest.mark.parametrize("widths", [(8, 1024), (1024, 8), (1024, 1280), (8, 1000)])
def test_what_is_made_in_pieces_is_the_whole_product(widths):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(2, 20, width)) for width in widths)
    assert products.pieces(1024) == 4 and products.pieces(1280) == 5 and products.pieces(1000) == 4
    whole = np.einsum("btd,btf->df", x, y)
    for after in (None, jnp.float32(3)):
        made = jax.jit(products.over_rows)(jnp.float32(x), jnp.float32(y), after=after)
        np.testing.assert_allclose(made, whole, rtol=1e-4, atol=1e-4)
    for axis, side in enumerate((x, y)):
        made = jax.jit(products.by_kernel, static_argnums=2)(jnp.float32(side), jnp.float32(whole), axis)
        expected = side @ (whole.T if axis else whole)
        np.testing.assert_allclose(made, expected, atol=1e-5 * np.abs(expected).max())
