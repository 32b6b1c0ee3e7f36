"""Exact categorical draws from logits, by inverse CDF in two levels."""

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


def keep_nucleus(logits_bv: jax.Array, top_p: float) -> jax.Array:
    """Sets to -inf every token outside the smallest set of likeliest ones that holds top_p of the mass."""
    order_bv = jnp.argsort(-logits_bv, axis=-1)
    sorted_bv = jnp.take_along_axis(jax.nn.softmax(logits_bv, axis=-1), order_bv, axis=-1)
    before_bv = jnp.cumsum(sorted_bv, axis=-1) - sorted_bv
    rank_bv = jnp.argsort(order_bv, axis=-1)
    keep_bv = jnp.take_along_axis(before_bv < top_p, rank_bv, axis=-1)
    return jnp.where(keep_bv, logits_bv, -jnp.inf)
