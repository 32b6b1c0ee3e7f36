"""Streams with empty slots: what is read from them, and which gradients come back."""

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.policies.packing import pack_lengths, pack_only


def test_an_empty_slot_gives_no_gradient_back_and_counted_ones_no_scatter():
    made = jax.tree.map(jnp.asarray, pack_lengths([2, 0, 3], 3, slots=8))
    x = jnp.arange(9.0).reshape(3, 3, 1) + 1

    def back(x):
        y, vjp = jax.vjp(lambda x: pack_only(x, made), x)
        return y, vjp(jnp.where(made.place_cn[..., None] >= 0, 2.0, jnp.nan))[0]

    y, d_x = back(x)
    np.testing.assert_array_equal(jnp.ravel(y)[:5], [1, 2, 7, 8, 9])
    assert jnp.all(jnp.isfinite(y))
    np.testing.assert_array_equal(d_x[..., 0], [[2, 2, 0], [0, 0, 0], [2, 2, 2]])
    assert "scatter" not in str(jax.make_jaxpr(back)(x))
