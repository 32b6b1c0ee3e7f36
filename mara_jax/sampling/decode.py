"""Decoding where every sample has a row, until the last one has ended."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import decoding, transformer
from mara_jax.sampling import draw


class Start(NamedTuple):
    """What decoding begins from: p prompts, already computed, and b samples of them, row-major.

    arch, params and prefix as `decoding.lay_out` lays them out; lengths_p: tokens of each prompt; last_pd: the
    hidden state of its last token; keys_b: one a sample; shaping: how each prompt's tokens are drawn, [p] each; ends:
    the tokens that end a completion; width: most tokens of one; pad_id: what stands behind its end.
    """

    arch: transformer.Architecture
    params: Any
    prefix: transformer.KV
    lengths_p: jax.Array
    last_pd: jax.Array
    keys_b: jax.Array
    shaping: draw.Shaping
    ends: jax.Array
    width: int
    pad_id: int


def choose(start: Start, hidden_bd, keys_b, at, shaping: draw.Shaping) -> tuple[jax.Array, jax.Array]:
    """The tokens that follow hidden states, and their log-probs; `at`: tokens drawn before, of all rows or of each."""
    logits_bv = decoding.logits(start.arch, start.params, hidden_bd)
    keys_b = jax.vmap(jax.random.fold_in)(keys_b, jnp.broadcast_to(at, keys_b.shape))
    return draw.choose(keys_b, logits_bv, shaping)


def together(start: Start) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decodes all samples at once: tokens [b, t], padded, their log-probs, 0 at padding, and steps in all, []."""
    rows, width, ends = start.keys_b.shape[0], start.width, start.ends
    spread = functools.partial(jnp.repeat, repeats=rows // start.lengths_p.shape[0], axis=0)
    start_b, shaping = spread(start.lengths_p), jax.tree.map(spread, start.shaping)

    def body(carry):
        at, token_b, done_b, cache, tokens_bt, logp_bt = carry
        hidden_b1d, cache = transformer.forward(
            start.arch, start.params, token_b[:, None], (start_b + at - 1)[:, None],
            prefix=start.prefix, prefix_lengths_p=start.lengths_p, cache=cache, index=at - 1,
        )  # fmt: skip
        token_b, logp_b = choose(start, hidden_b1d[:, 0], start.keys_b, at, shaping)
        token_b = jnp.where(done_b, start.pad_id, token_b)
        tokens_bt = tokens_bt.at[:, at].set(token_b)
        logp_bt = logp_bt.at[:, at].set(jnp.where(done_b, 0.0, logp_b))
        return at + 1, token_b, done_b | jnp.isin(token_b, ends), cache, tokens_bt, logp_bt

    def unfinished(carry):
        return (carry[0] < width) & ~jnp.all(carry[2])

    token_b, logp_b = choose(start, sharding.constrain(spread(start.last_pd), "rows"), start.keys_b, 0, shaping)
    tokens_bt = sharding.constrain(jnp.full((rows, width), start.pad_id, jnp.int32).at[:, 0].set(token_b), "rows")
    logp_bt = sharding.constrain(jnp.zeros((rows, width), logp_b.dtype).at[:, 0].set(logp_b), "rows")
    cache = transformer.init_cache(start.arch, rows, width)
    carry = (jnp.int32(1), token_b, jnp.isin(token_b, ends), cache, tokens_bt, logp_bt)
    at, _, _, _, tokens_bt, logp_bt = jax.lax.while_loop(unfinished, body, carry)
    return tokens_bt, logp_bt, at - 1
