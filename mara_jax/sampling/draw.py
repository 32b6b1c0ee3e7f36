"""Exact categorical draws from logits, by inverse CDF in two levels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 256  # tokens to a block; about the square root of usual vocabularies


def token_keys(key: jax.Array, prompt_ids_b: jax.Array, sample_ids_b: jax.Array) -> jax.Array:
    """One key per row, a function of (key, prompt id, sample id) alone.

    So a row's text does not depend on which rows share its batch.
    """
    fold = jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(key, prompt), sample))
    return fold(prompt_ids_b, sample_ids_b)


def _blocks(logits_vb: jax.Array) -> jax.Array:
    """Logits by block, token of the block and row, [n, k, b]; tokens that fill the last block up are never drawn.

    Rows come last because all sums run over tokens: a CPU then adds up many rows at once, and its head makes logits in
    this order (`decoding.logits`), so that nothing is transposed.
    """
    vocab, rows = logits_vb.shape
    padding = ((0, -vocab % BLOCK), (0, 0))
    return jnp.pad(logits_vb, padding, constant_values=-jnp.inf).reshape(-1, BLOCK, rows)


def _drawn(keys_b: jax.Array, blocks_nkb: jax.Array, greedy_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [b] drawn from softmax, exactly up to float32 rounding; -inf is never drawn. And whether there was one
    to draw from, [b]: not where a logit is NaN or infinity, or all are -inf.

    A first uniform picks a block of tokens by the blocks' masses, a second one a token inside it: two short cumulative
    sums in place of one Gumbel variate per word, and finer tails than one uniform of 23 bits could reach. A greedy row
    takes the likeliest: all weight is on those, and a uniform of 0 picks the first.
    """
    top_b = _top(blocks_nkb)
    weight_nkb = jnp.where(greedy_b, (blocks_nkb == top_b).astype(top_b.dtype), jnp.exp(blocks_nkb - top_b))
    u_b2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_b)
    u_2b = jnp.where(greedy_b, 0.0, u_b2.T)
    cdf_nb = jnp.cumsum(weight_nkb.sum(1), axis=0)
    block_b = _invert(cdf_nb, u_2b[0])
    inside_kb = jnp.take_along_axis(weight_nkb, block_b[None, None, :], axis=0)[0]
    return block_b * BLOCK + _invert(jnp.cumsum(inside_kb, axis=0), u_2b[1]), jnp.isfinite(cdf_nb[-1])


def _top(blocks_nkb: jax.Array) -> jax.Array:
    return jnp.max(jnp.max(blocks_nkb, axis=1), axis=0)


def _logp(blocks_nkb: jax.Array, token_b: jax.Array) -> jax.Array:
    """Log-probs [b] of tokens under softmax."""
    top_b = _top(blocks_nkb)
    total_b = jnp.sum(jnp.sum(jnp.exp(blocks_nkb - top_b), axis=1), axis=0)
    flat_vb = blocks_nkb.reshape(-1, token_b.size)
    return jnp.take_along_axis(flat_vb, token_b[None, :], axis=0)[0] - top_b - jnp.log(total_b)


def _invert(cdf_nb: jax.Array, u_b: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds u times the total: never one of zero weight."""
    return jnp.sum(cdf_nb <= u_b * cdf_nb[-1:], axis=0, dtype=jnp.int32)


def keep_likeliest(logits_bv: jax.Array, top_k_b: jax.Array | None, top_p_b: jax.Array | None) -> jax.Array:
    """Sets to -inf every token but a row's likeliest ones, exactly as many as asked for where several are equal.

    Args:
      logits_bv: [b, v].
      top_k_b: how many to keep; 0: all.
      top_p_b: of those, the fewest that hold this share of their mass; 1: all.
    """
    order_bv = jnp.argsort(-logits_bv, axis=-1)
    kept_bv = jnp.ones(logits_bv.shape, bool)
    if top_k_b is not None:
        kept_bv = (jnp.arange(logits_bv.shape[-1]) < top_k_b[:, None]) | (top_k_b == 0)[:, None]
    if top_p_b is not None:
        sorted_bv = jnp.take_along_axis(logits_bv, order_bv, axis=-1)
        share_bv = jax.nn.softmax(jnp.where(kept_bv, sorted_bv, -jnp.inf), axis=-1)
        before_bv = jnp.cumsum(share_bv, axis=-1) - share_bv
        # The sum of all shares is 1 only up to rounding: at top_p = 1 nothing may be lost to it.
        kept_bv &= (before_bv < top_p_b[:, None]) | (top_p_b >= 1)[:, None]
    rank_bv = jnp.argsort(order_bv, axis=-1)
    return jnp.where(jnp.take_along_axis(kept_bv, rank_bv, axis=-1), logits_bv, -jnp.inf)


class SamplingParams(NamedTuple):
    """How tokens are drawn, an entry a prompt or a row: temperature (0: the likeliest token), top_k (0: all) and
    top_p, the last two None where nothing is cut."""

    temperature: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None


def draw_tokens(keys_b: jax.Array, logits_bv: jax.Array, sampling: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """Draws a token a row as `sampling` (of rows) says; its log-prob is the policy's own, at temperature 1 and uncut.

    Args:
      keys_b: [b] keys.
      logits_bv: [b, v] float32.

    Returns:
      tokens [b] int32 and log-probs [b] float32 (nats); where logits are not finite the log-prob is NaN, and the token
      means nothing.
    """
    greedy_b = sampling.temperature == 0
    logits_vb = logits_bv.T  # first of all: a CPU would transpose what is computed from them in memory
    shaped_vb = logits_vb / jnp.where(greedy_b, 1.0, sampling.temperature)
    if sampling.top_k is not None or sampling.top_p is not None:
        shaped_vb = keep_likeliest(shaped_vb.T, sampling.top_k, sampling.top_p).T
    token_b, possible_b = _drawn(keys_b, _blocks(shaped_vb), greedy_b)
    return token_b, jnp.where(possible_b, _logp(_blocks(logits_vb), token_b), jnp.nan)
