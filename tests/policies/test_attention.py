"""Attention and its own gradient against a plain softmax over keys repeated for every row, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.policies import attention

B, P, K, M, T, S, H = 6, 2, 2, 3, 5, 7, 8  # rows, prompts, key heads, queries of each, times, prefix slots, channels


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


def plain(q, own, prefix, mask, seen):
    """The definition: every row with its own copy of all keys, one softmax over the visible ones."""
    keys, values = own
    visible = jnp.broadcast_to(mask, (B, K, M * T, T))
    if prefix is not None:
        keys, values = (
            jnp.concatenate([jnp.repeat(shared, B // P, axis=0), mine], axis=2)
            for shared, mine in zip(prefix, own, strict=True)
        )
        before = jnp.broadcast_to(jnp.repeat(seen, B // P, axis=0)[:, None, None, :], (B, K, M * T, S))
        visible = jnp.concatenate([before, visible], axis=-1)
    score = jnp.where(visible, jnp.einsum("bkxh,bksh->bkxs", q, keys), -jnp.inf)
    return jnp.einsum("bkxs,bksh->bkxh", jax.nn.softmax(score, axis=-1), values)


@pytest.mark.parametrize(("least_block", "blocks"), [(64, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("shared", [False, True])
def test_values_and_gradients_are_those_of_the_definition(float64, monkeypatch, shared, least_block, blocks):
    monkeypatch.setattr(attention, "LEAST_BLOCK", least_block)
    assert len(attention._blocks(T, T)) == blocks
    q, own = drawn(B, K, M * T, H) * 3, (drawn(B, K, T, H), drawn(B, K, T, H) + 1)
    prefix = (drawn(P, K, S, H), drawn(P, K, S, H) - 1) if shared else None
    mask = jnp.tile(jnp.arange(T) <= jnp.arange(T)[:, None], (M, 1))
    seen = jnp.arange(S) < jnp.array([[3], [7]])

    def ours(q, own, prefix):
        return attention.attend(q, (*own, mask), None if prefix is None else (*prefix, seen), t=T)

    def definition(q, own, prefix):
        return attention.laid_out(plain(q, own, prefix, mask, seen), T, None)

    def loss(attend):
        weight = drawn(B, T, K * M * H)
        return lambda *args: jnp.sum(weight * jnp.tanh(attend(*args)))

    np.testing.assert_allclose(ours(q, own, prefix), definition(q, own, prefix), rtol=1e-12, atol=1e-13)
    gradients = (jax.grad(loss(attend), (0, 1, 2))(q, own, prefix) for attend in (ours, definition))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12), *gradients)


def test_far_scores_neither_overflow_nor_vanish():
    """A softmax of scores 1e4 apart is one at the highest, wherever that key lies, and its gradient is finite."""
    q = jnp.full((2, 1, 1, 2), 100.0)
    own = (jnp.full((2, 1, 1, 2), 1.0), jnp.full((2, 1, 1, 2), 7.0))
    prefix = (jnp.array([[[[50.0, 50.0], [-50.0, -50.0]]]]), jnp.array([[[[3.0, 4.0], [9.0, 9.0]]]]))
    seen = jnp.ones((1, 2), bool)
    run = lambda q: attention.attend(q, (*own, jnp.ones((1, 1), bool)), (*prefix, seen))  # noqa: E731
    np.testing.assert_array_equal(run(q)[0, 0, 0], [3.0, 4.0])
    np.testing.assert_array_equal(run(-q)[0, 0, 0], [9.0, 9.0])
    np.testing.assert_array_equal(jax.grad(lambda q: jnp.sum(run(q)))(q), jnp.zeros_like(q))
