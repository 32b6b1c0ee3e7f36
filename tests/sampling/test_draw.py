"""The two-level inverse-CDF draw against the distribution it claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mara_jax.sampling import draw


def keys(n: int, seed: int = 0) -> jax.Array:
    return draw.token_keys(jax.random.key(seed), jnp.zeros(n, jnp.int32), jnp.arange(n))


def plain(keys_b: jax.Array, logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
    return draw.draw_tokens(keys_b, logits_bv, draw.SamplingParams(jnp.ones(len(logits_bv))))


@pytest.mark.parametrize("vocab", [3, 256, 700])
def test_draws_follow_softmax_by_chi_square(vocab):
    logits = jax.random.normal(jax.random.key(vocab), (vocab,)) * 1.5
    n = 40_000
    tokens, logp = jax.jit(plain)(keys(n), jnp.broadcast_to(logits, (n, vocab)))
    expected = np.asarray(jax.nn.softmax(logits), np.float64)
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    rare = expected * n < 5
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected / expected.sum() * n)]
    pooled = [x[: len(x) - (pooled[1][-1] < 1e-9)] for x in pooled]
    assert stats.chisquare(*pooled).pvalue > 1e-3
    np.testing.assert_allclose(logp, np.log(expected)[tokens], atol=2e-6)


def test_zero_weight_is_never_drawn():
    logits = jnp.full((5_000, 600), -jnp.inf).at[:, 299].set(0.0).at[:, 555].set(-1.0)
    tokens, _ = jax.jit(plain)(keys(5_000), logits)
    assert set(np.unique(tokens)) == {299, 555}


def test_extreme_uniforms_stay_inside_the_support():
    cdf = jnp.array([0.0, 0.0, 0.25, 0.25, 1.0, 1.0])[:, None]
    for u, index in [(0.0, 2), (0.2499, 2), (0.25, 4), (1 - 2**-24, 4)]:
        assert int(draw._invert(cdf, jnp.array([u]))[0]) == index


def test_the_likeliest_tokens_are_kept_by_hand():
    """Shares .1 .5 .15 .25; of equal tokens the first ones are kept, so that their number is the one asked for."""
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]] * 7 + [[0.25] * 4]))
    top_k, top_p = [0, 0, 2, 3, 9, 1, 3, 2], [0.7, 0.4, 1.0, 1.0, 1.0, 0.1, 0.8, 1.0]
    expected = ["0101", "0100", "0101", "0111", "1111", "0100", "0101", "1100"]  # .75 / .9 is above .8
    kept = draw.keep_likeliest(logits, jnp.array(top_k), jnp.array(top_p))
    assert ["".join("01"[int(x)] for x in row) for row in jnp.isfinite(kept)] == expected
    alone = draw.keep_likeliest(logits[:2], None, jnp.array(top_p[:2]))
    np.testing.assert_array_equal(alone, kept[:2])


def test_tokens_are_cut_as_transformers_cuts_them():
    torch, logits_process = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32) * 3
    top_k, top_p = np.array([0, 40, 7, 0, 300, 1]), np.array([0.9, 0.8, 1.0, 0.3, 0.999, 0.5], np.float32)
    kept = draw.keep_likeliest(jnp.asarray(logits), jnp.asarray(top_k), jnp.asarray(top_p))
    for row, k, p, ours in zip(logits, top_k.tolist(), top_p.tolist(), kept, strict=True):
        theirs = torch.tensor(row)[None]
        if k:
            theirs = logits_process.TopKLogitsWarper(k)(None, theirs)
        if p < 1:
            theirs = logits_process.TopPLogitsWarper(p)(None, theirs)
        np.testing.assert_array_equal(ours, theirs[0].numpy())


def test_a_row_that_cuts_nothing_keeps_every_token_beside_one_that_does():
    """Shares of 100,000 equal tokens, summed, reach 1 before the last of them."""
    logits = jnp.zeros((2, 100_000))
    kept = draw.keep_likeliest(logits, None, jnp.array([1.0, 0.5]))
    assert jnp.isfinite(kept[0]).all() and 49_000 < jnp.isfinite(kept[1]).sum() < 51_000


def test_temperature_0_takes_the_first_of_the_likeliest_beside_rows_that_draw():
    """Ties inside a block, across blocks and at its first token; log-probs stay the policy's own."""
    logits = jax.random.normal(jax.random.key(3), (6, 700))
    for row, words in enumerate([(5, 9), (300, 255), (256, 511), (699,), (0, 1)]):
        logits = logits.at[row, jnp.array(words)].set(9.0)
    shaping = draw.SamplingParams(jnp.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.5]))
    tokens, logp = jax.jit(draw.draw_tokens)(keys(6), logits, shaping)
    assert tokens[:5].tolist() == [5, 255, 256, 699, 0]
    assert tokens[5] == plain(keys(6), logits / 0.5)[0][5]
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits)[jnp.arange(6), tokens], atol=2e-6)


BROKEN = {
    "NaN": [0.0, jnp.nan, 1.0],
    "infinity": [0.0, jnp.inf, 1.0],
    "two infinities": [jnp.inf, -1.0, jnp.inf],
    "no token left": [-jnp.inf, -jnp.inf, -jnp.inf],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cut", [False, True])
def test_logits_that_are_not_finite_are_told_by_a_log_prob_of_nan(temperature, cut):
    """Beside rows that are finite, which keep theirs; in the last block of several, too."""
    rows = jnp.pad(
        jnp.array([*BROKEN.values(), [0.0, -jnp.inf, jnp.log(3.0)]]), ((0, 0), (600, 100)), constant_values=-jnp.inf
    )
    cuts = (jnp.full(5, 2), jnp.full(5, 0.99)) if cut else ()
    token, logp = jax.jit(draw.draw_tokens)(keys(5), rows, draw.SamplingParams(jnp.full(5, temperature), *cuts))
    assert np.isnan(logp[:4]).all()
    assert int(token[4]) in (600, 602)
    np.testing.assert_allclose(logp[4], np.log({600: 1 / 4, 602: 3 / 4}[int(token[4])]), rtol=1e-6)


def test_a_temperature_at_which_logits_overflow_is_told_as_well():
    _, logp = draw.draw_tokens(keys(2), jnp.array([[10.0, 20.0], [0.0, 0.0]]), draw.SamplingParams(jnp.full(2, 2e-38)))
    np.testing.assert_allclose(logp, [np.nan, np.log(0.5)])
