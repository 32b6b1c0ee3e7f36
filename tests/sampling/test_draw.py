"""The two-level inverse-CDF draw against the distribution it claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mara_jax.sampling import draw


def keys(n: int, seed: int = 0) -> jax.Array:
    return draw.token_keys(jax.random.key(seed), jnp.zeros(n, jnp.int32), jnp.arange(n))


@pytest.mark.parametrize("vocab", [3, 256, 700])
def test_draws_follow_softmax_by_chi_square(vocab):
    logits = jax.random.normal(jax.random.key(vocab), (vocab,)) * 1.5
    n = 40_000
    tokens, logp = jax.jit(draw.draw)(keys(n), jnp.broadcast_to(logits, (n, vocab)))
    expected = np.asarray(jax.nn.softmax(logits), np.float64)
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    rare = expected * n < 5
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected / expected.sum() * n)]
    pooled = [x[: len(x) - (pooled[1][-1] < 1e-9)] for x in pooled]
    assert stats.chisquare(*pooled).pvalue > 1e-3
    np.testing.assert_allclose(logp, np.log(expected)[tokens], atol=2e-6)


def test_zero_weight_is_never_drawn():
    logits = jnp.full((5_000, 600), -jnp.inf).at[:, 299].set(0.0).at[:, 555].set(-1.0)
    tokens, _ = draw.draw(keys(5_000), logits)
    assert set(np.unique(tokens)) == {299, 555}


def test_extreme_uniforms_stay_inside_the_support():
    cdf = jnp.array([[0.0, 0.0, 0.25, 0.25, 1.0, 1.0]])
    for u, index in [(0.0, 2), (0.2499, 2), (0.25, 4), (1 - 2**-24, 4)]:
        assert int(draw._invert(cdf, jnp.array([u]))[0]) == index


def test_nucleus_keeps_the_smallest_set_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    kept = draw.keep_nucleus(logits, 0.7)
    np.testing.assert_array_equal(jnp.isfinite(kept), [[False, True, False, True]])
    kept = draw.keep_nucleus(logits, 0.4)
    np.testing.assert_array_equal(jnp.isfinite(kept), [[False, True, False, False]])
