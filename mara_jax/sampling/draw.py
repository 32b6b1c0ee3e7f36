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


def draw(keys_b: jax.Array, logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row from softmax(logits), exactly up to float32 rounding.

    A first uniform picks a block of tokens by the blocks' masses, a second one a token inside it:
    two short cumulative sums in place of one Gumbel variate per word, and finer tails than one
    uniform of 23 bits could reach.

    Args:
      keys_b: [b] keys, one a row.
      logits_bv: [b, v] float32; -inf is never drawn.

    Returns:
      tokens [b] int32 and their log-probs [b] float32 (nats).
    """
    rows, vocab = logits_bv.shape
    top_b1 = jnp.max(logits_bv, axis=-1, keepdims=True)
    weight_bv = jnp.exp(logits_bv - top_b1)
    padded = -(-vocab // BLOCK) * BLOCK
    weight_bnk = jnp.pad(weight_bv, ((0, 0), (0, padded - vocab))).reshape(rows, -1, BLOCK)
    block_cdf_bn = jnp.cumsum(weight_bnk.sum(-1), axis=-1)
    u_b2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_b)
    block_b = _invert(block_cdf_bn, u_b2[:, 0])
    inside_bk = jnp.take_along_axis(weight_bnk, block_b[:, None, None], axis=1)[:, 0]
    token_b = block_b * BLOCK + _invert(jnp.cumsum(inside_bk, axis=-1), u_b2[:, 1])
    chosen_b = jnp.take_along_axis(logits_bv, token_b[:, None], axis=1)[:, 0]
    return token_b, chosen_b - top_b1[:, 0] - jnp.log(block_cdf_bn[:, -1])


def _invert(cdf_bn: jax.Array, u_b: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds u times the total: never one of zero weight."""
    reached_bn = cdf_bn <= u_b[:, None] * cdf_bn[:, -1:]
    return jnp.sum(reached_bn, axis=-1, dtype=jnp.int32)


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


class Shaping(NamedTuple):
    """How tokens are drawn, an entry a prompt or a row: temperature (0: the likeliest token), top_k (0: all) and
    top_p, the last two None where nothing is cut."""

    temperature: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None


def choose(keys_b: jax.Array, logits_bv: jax.Array, shaping: Shaping) -> tuple[jax.Array, jax.Array]:
    """Draws a token a row as `shaping` (of rows) says; its log-prob is the policy's own, at temperature 1 and uncut.

    Args:
      keys_b: [b] keys.
      logits_bv: [b, v] float32.

    Returns:
      tokens [b] int32 and log-probs [b] float32 (nats).
    """
    greedy_b = shaping.temperature == 0
    shaped_bv = logits_bv / jnp.where(greedy_b, 1.0, shaping.temperature)[:, None]
    if shaping.top_k is not None or shaping.top_p is not None:
        shaped_bv = keep_likeliest(shaped_bv, shaping.top_k, shaping.top_p)
    drawn_b, _ = draw(keys_b, shaped_bv)
    token_b = jnp.where(greedy_b, jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), drawn_b)
    chosen_b = jnp.take_along_axis(logits_bv, token_b[:, None], axis=1)[:, 0]
    return token_b, chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)
