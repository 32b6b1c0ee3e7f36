"""Decoding a static batch: every sample has a row, until the last one has ended."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import decoding, transformer
from mara_jax.sampling import draw
from mara_jax.sampling.draw import SamplingParams


class Prefilled(NamedTuple):
    """What decoding begins from: p prompts, already computed, and b samples of them, row-major.

    arch, params and prefix as `decoding.lay_out` lays them out; lengths_p: tokens of each prompt; last_pd: the
    hidden state of its last token; keys_b: one a sample; sampling: of each prompt; eos_ids: the tokens that end a
    completion; width: most tokens of one; pad_id: what stands behind its end; axis_name: as of `rollout.Settings`.
    """

    arch: transformer.Architecture
    params: Any
    prefix: transformer.KV
    lengths_p: jax.Array
    last_pd: jax.Array
    keys_b: jax.Array
    sampling: SamplingParams
    eos_ids: jax.Array
    width: int
    pad_id: int
    axis_name: str | None = None


def next_tokens(start: Prefilled, hidden_bd, keys_b, count, sampling: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """The tokens that follow hidden states, and their log-probs; count: tokens drawn before, of all rows or each."""
    logits_bv = decoding.logits(start.arch, start.params, hidden_bd)
    keys_b = jax.vmap(jax.random.fold_in)(keys_b, jnp.broadcast_to(count, keys_b.shape))
    return draw.draw_tokens(keys_b, logits_bv, sampling)


def decode_statically(start: Prefilled) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decodes all samples at once: tokens [b, t], padded, their log-probs, 0 at padding, and steps in all, []."""
    rows, width = start.keys_b.shape[0], start.width
    to_samples = functools.partial(jnp.repeat, repeats=rows // start.lengths_p.shape[0], axis=0)
    lengths_b, sampling = to_samples(start.lengths_p), jax.tree.map(to_samples, start.sampling)

    def body(carry):
        count, token_b, ended_b, cache, tokens_bt, logp_bt = carry
        hidden_b1d, cache = transformer.forward(
            start.arch, start.params, token_b[:, None], (lengths_b + count - 1)[:, None],
            prefix=start.prefix, prefix_lengths_p=start.lengths_p, cache=cache, index=count - 1,
        )  # fmt: skip
        token_b, logp_b = next_tokens(start, hidden_b1d[:, 0], start.keys_b, count, sampling)
        token_b = jnp.where(ended_b, start.pad_id, token_b)
        tokens_bt = tokens_bt.at[:, count].set(token_b)
        logp_bt = logp_bt.at[:, count].set(jnp.where(ended_b, 0.0, logp_b))
        return count + 1, token_b, ended_b | jnp.isin(token_b, start.eos_ids), cache, tokens_bt, logp_bt

    def unfinished(carry):
        count, _, ended_b, *_ = carry
        open_rows = jnp.sum(~ended_b)
        # One number for all policies: of a condition of each, vmap would make a copy of the cache at every token.
        return (count < width) & ((jax.lax.psum(open_rows, start.axis_name) if start.axis_name else open_rows) > 0)

    last_bd = sharding.constrain(to_samples(start.last_pd), "rows")
    token_b, logp_b = next_tokens(start, last_bd, start.keys_b, 0, sampling)
    tokens_bt = sharding.constrain(jnp.full((rows, width), start.pad_id, jnp.int32).at[:, 0].set(token_b), "rows")
    logp_bt = sharding.constrain(jnp.zeros((rows, width), logp_b.dtype).at[:, 0].set(logp_b), "rows")
    cache = transformer.init_cache(start.arch, rows, width)
    carry = (jnp.int32(1), token_b, jnp.isin(token_b, start.eos_ids), cache, tokens_bt, logp_bt)
    count, _, _, _, tokens_bt, logp_bt = jax.lax.while_loop(unfinished, body, carry)
    return tokens_bt, logp_bt, count - 1
