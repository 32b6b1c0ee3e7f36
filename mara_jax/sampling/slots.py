"""Decoding in fewer rows than there are samples: a row whose sample has ended goes to the next one that waits.

So one long sample does not hold the batch. All rows write to the same slot of the cache, which is a ring: a sample that
begins at any step finds its own slots by counting back from there, and what an earlier one left is never seen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.policies import transformer
from mara_jax.sampling import decode
from mara_jax.sampling.decode import Start


class Rows(NamedTuple):
    """The rows of c queues, s each: which sample of its queue a row decodes (n, their number: none), how many of its
    tokens are drawn, and the last of them; all [c, s]."""

    sample: jax.Array
    drawn: jax.Array
    token: jax.Array


class Queues(NamedTuple):
    """Samples in the order in which rows take them, [c, n], and how many of them there are to take, [c]."""

    order: jax.Array
    count: jax.Array


def refilled(start: Start, slots: int, every: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decodes `slots` samples at a time; as `decode.together`.

    Where every prompt can have as many rows, they take its samples alone and read its keys and values where they lie.
    Otherwise all rows take the samples of all prompts in turn, and each row has a copy of its prompt's.

    Args:
      every: free rows are refilled every so many steps.
    """
    prompts, b = start.lengths_p.shape[0], start.keys_b.shape[0]
    own = slots % prompts == 0
    c = prompts if own else 1
    n, group = b // c, b // prompts
    first_b, first_logp_b = _first_tokens(start, group)
    tokens_bt = jnp.full((b, start.width), start.pad_id, jnp.int32).at[:, 0].set(first_b)
    logp_bt = jnp.zeros((b, start.width), first_logp_b.dtype).at[:, 0].set(first_logp_b)
    queues = _queues(first_b.reshape(c, n), start)

    def step(prefix, lengths_r, carry):
        made, rows, cache, tokens_bt, logp_bt = carry
        sample_r = (jnp.arange(c)[:, None] * n + jnp.minimum(rows.sample, n - 1)).ravel()
        drawn_r, prompt_r, live_r = rows.drawn.ravel(), sample_r // group, rows.sample.ravel() < n
        hidden_r1d, cache = transformer.forward(
            start.arch, start.params, rows.token.reshape(-1, 1), (start.lengths_p[prompt_r] + drawn_r - 1)[:, None],
            prefix=prefix, prefix_lengths_p=lengths_r, cache=cache, index=made % start.width, counts_b=drawn_r,
        )  # fmt: skip
        shaping = jax.tree.map(lambda x: x[prompt_r], start.shaping)
        token_r, logp_r = decode.choose(start, hidden_r1d[:, 0], start.keys_b[sample_r], drawn_r, shaping)
        to_r = jnp.where(live_r, sample_r, b)  # what a free row computes is dropped
        tokens_bt = tokens_bt.at[to_r, drawn_r].set(token_r, mode="drop")
        logp_bt = logp_bt.at[to_r, drawn_r].set(logp_r, mode="drop")
        rows = _after(rows, token_r.reshape(rows.token.shape), n, start)
        return made + 1, rows, cache, tokens_bt, logp_bt

    def stretch(carry):
        taken_c, (made, rows, *rest) = carry
        rows, taken_c = _refill(rows, taken_c, queues, first_b.reshape(c, n))
        prefix, lengths_r = start.prefix, start.lengths_p
        if not own:
            prompt_r = jnp.minimum(rows.sample, n - 1).ravel() // group
            prefix, lengths_r = jax.tree.map(lambda x: x[prompt_r], (prefix, lengths_r))
        goes_on = lambda carry: (carry[0] < made + every) & jnp.any(carry[1].sample < n)  # noqa: E731
        body = lambda carry: step(prefix, lengths_r, carry)  # noqa: E731
        return taken_c, jax.lax.while_loop(goes_on, body, (made, rows, *rest))

    def unfinished(carry):
        taken_c, (_, rows, *_) = carry
        return jnp.any(taken_c < queues.count) | jnp.any(rows.sample < n)

    shape = (c, slots // c)
    rows = Rows(jnp.full(shape, n), jnp.ones(shape, jnp.int32), jnp.zeros(shape, jnp.int32))
    cache = transformer.init_cache(start.arch, slots, start.width)
    begin = (jnp.zeros(c, jnp.int32), (jnp.int32(0), rows, cache, tokens_bt, logp_bt))
    _, (made, _, _, tokens_bt, logp_bt) = jax.lax.while_loop(unfinished, stretch, begin)
    return tokens_bt, logp_bt, made


def _first_tokens(start: Start, group: int) -> tuple[jax.Array, jax.Array]:
    """Every sample's first token and its log-prob, [b]: they follow the prompt, which is computed already.

    One sample of each prompt at a time: there is never a row of logits for each sample.
    """
    keys_gp = start.keys_b.reshape(-1, group).T
    first = jax.lax.map(lambda keys_p: decode.choose(start, start.last_pd, keys_p, 0, start.shaping), keys_gp)
    return tuple(x_gp.T.ravel() for x_gp in first)


def _ended(token: jax.Array, drawn: jax.Array | int, start: Start) -> jax.Array:
    return jnp.isin(token, start.ends) | (drawn >= start.width)


def _queues(first_cn: jax.Array, start: Start) -> Queues:
    """The samples that their first token does not end, in order."""
    over_cn = _ended(first_cn, 1, start)
    return Queues(jnp.argsort(over_cn, axis=-1, stable=True), jnp.sum(~over_cn, axis=-1, dtype=jnp.int32))


def _after(rows: Rows, token: jax.Array, n: int, start: Start) -> Rows:
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
