"""Continuous batching: fewer rows than samples; a row whose sample has ended takes the next one that waits.

So one long sample does not hold the batch. All rows write to the same slot of the KV cache, which is a ring: a sample
that begins at any step finds its own slots by counting back from there, and what an earlier one left is never seen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.policies import transformer
from mara_jax.sampling import decode
from mara_jax.sampling.decode import Prefilled


class Rows(NamedTuple):
    """The rows of c queues, s each, all [c, s]: which sample of its queue a row decodes (n, their number: none), how
    many of its tokens are drawn, and the last of them."""

    sample: jax.Array
    drawn: jax.Array
    token: jax.Array


class Queues(NamedTuple):
    """Samples in the order in which rows take them, [c, n], and how many of them there are to take, [c]."""

    order: jax.Array
    count: jax.Array


def decode_continuously(start: Prefilled, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decodes `slots` samples at a time; returns what `decode.decode_statically` does.

    Where every prompt can have as many rows, they take its samples alone and read its keys and values where they lie.
    Otherwise all rows take the samples of all prompts in turn, and each row has a copy of its prompt's.
    """
    prompts, b = start.lengths_p.shape[0], start.keys_b.shape[0]
    own = slots % prompts == 0
    c = prompts if own else 1
    n, group = b // c, b // prompts
    first_b, first_logp_b = _first_tokens(start, group)
    first_cn = first_b.reshape(c, n)
    tokens_bt = jnp.full((b, start.width), start.pad_id, jnp.int32).at[:, 0].set(first_b)
    logp_bt = jnp.zeros((b, start.width), first_logp_b.dtype).at[:, 0].set(first_logp_b)
    queues = _queues(first_cn, start)

    def body(carry):
        steps, taken_c, rows, cache, tokens_bt, logp_bt = carry
        rows, taken_c = _refill(rows, taken_c, queues, first_cn)
        sample_r = (jnp.arange(c)[:, None] * n + jnp.minimum(rows.sample, n - 1)).ravel()
        drawn_r, prompt_r, busy_r = rows.drawn.ravel(), sample_r // group, rows.sample.ravel() < n
        prefix, lengths_p = start.prefix, start.lengths_p
        if not own:
            prefix, lengths_p = jax.tree.map(lambda x: x[prompt_r], (prefix, lengths_p))
        hidden_r1d, cache = transformer.forward(
            start.arch, start.params, rows.token.reshape(-1, 1), (start.lengths_p[prompt_r] + drawn_r - 1)[:, None],
            prefix=prefix, prefix_lengths_p=lengths_p, cache=cache, index=steps % start.width, counts_b=drawn_r,
        )  # fmt: skip
        sampling = jax.tree.map(lambda x: x[prompt_r], start.sampling)
        token_r, logp_r = decode.next_tokens(start, hidden_r1d[:, 0], start.keys_b[sample_r], drawn_r, sampling)
        to_r = jnp.where(busy_r, sample_r, b)  # what a free row computes is dropped
        tokens_bt = tokens_bt.at[to_r, drawn_r].set(token_r, mode="drop")
        logp_bt = logp_bt.at[to_r, drawn_r].set(logp_r, mode="drop")
        rows = _free_ended(rows, token_r.reshape(rows.token.shape), n, start)
        return steps + 1, taken_c, rows, cache, tokens_bt, logp_bt

    def unfinished(carry):
        _, taken_c, rows, *_ = carry
        return jnp.any(taken_c < queues.count) | jnp.any(rows.sample < n)

    shape = (c, slots // c)
    rows = Rows(jnp.full(shape, n), jnp.ones(shape, jnp.int32), jnp.zeros(shape, jnp.int32))
    cache = transformer.init_cache(start.arch, slots, start.width)
    begin = (jnp.int32(0), jnp.zeros(c, jnp.int32), rows, cache, tokens_bt, logp_bt)
    steps, _, _, _, tokens_bt, logp_bt = jax.lax.while_loop(unfinished, body, begin)
    return tokens_bt, logp_bt, steps


def _first_tokens(start: Prefilled, group: int) -> tuple[jax.Array, jax.Array]:
    """Every sample's first token and its log-prob, [b]: they follow the prompt, which is computed already.

    One sample of each prompt at a time: there is never a row of logits for each sample.
    """
    keys_gp = start.keys_b.reshape(-1, group).T
    first = jax.lax.map(lambda keys_p: decode.next_tokens(start, start.last_pd, keys_p, 0, start.sampling), keys_gp)
    return tuple(x_gp.T.ravel() for x_gp in first)


def _ended(token: jax.Array, drawn: jax.Array | int, start: Prefilled) -> jax.Array:
    return jnp.isin(token, start.eos_ids) | (drawn >= start.width)


def _queues(first_cn: jax.Array, start: Prefilled) -> Queues:
    """The samples that their first token does not end, in order."""
    ended_cn = _ended(first_cn, 1, start)
    return Queues(jnp.argsort(ended_cn, axis=-1, stable=True), jnp.sum(~ended_cn, axis=-1, dtype=jnp.int32))


def _free_ended(rows: Rows, token: jax.Array, n: int, start: Prefilled) -> Rows:
    """The rows with one more token each, those whose sample it ends free."""
    drawn = rows.drawn + 1
    busy = (rows.sample < n) & ~_ended(token, drawn, start)
    return Rows(jnp.where(busy, rows.sample, n), jnp.where(busy, drawn, 1), token)


def _refill(rows: Rows, taken_c: jax.Array, queues: Queues, first_cn: jax.Array) -> tuple[Rows, jax.Array]:
    """Free rows take the next samples of their queue, as long as there are any."""
    n = first_cn.shape[-1]
    free = rows.sample == n
    place = taken_c[:, None] + jnp.cumsum(free, axis=-1) - 1
    new = free & (place < queues.count[:, None])
    sample = jnp.take_along_axis(queues.order, jnp.clip(place, 0, n - 1), axis=-1)
    token = jnp.take_along_axis(first_cn, sample, axis=-1)
    filled: Any = zip((sample, 1, token), rows, strict=True)
    rows = Rows(*(jnp.where(new, theirs, ours) for theirs, ours in filled))
    return rows, taken_c + jnp.sum(new, axis=-1, dtype=jnp.int32)
