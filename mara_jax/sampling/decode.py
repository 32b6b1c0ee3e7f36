"""Decoding where every sample has a row, until the last one has ended.

Every step attends to all slots of the cache, filled or not. So a long cache grows, with a loop for each of its lengths.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import decoding, kept, transformer
from mara_jax.sampling import draw

# Of a cache that grows, how many lengths and the shortest one, an even number. Each length is a loop to compile, and on
# accelerators, where nobody has measured what it saves, shorter caches than 1,024 are little beside a step's weights.
MOST_LENGTHS = 3
LEAST_LENGTH = {"cpu": 128, "gpu": 512, "tpu": 512}


class Start(NamedTuple):
    """What decoding begins from: p prompts, already computed, and b samples of them, row-major.

    arch, params and prefix as `decoding.lay_out` lays them out; lengths_p: tokens of each prompt; last_pd: the
    hidden state of its last token; keys_b: one a sample; shaping: how each prompt's tokens are drawn, [p] each; ends:
    the tokens that end a completion; width: most tokens of one; pad_id: what stands behind its end; room: for the
    products of kernels, None where they are not kept.
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
    room: kept.Room | None = None


def forward(start: Start, room: kept.Room | None, place_r: Any, live_r: Any, *args: Any, **given: Any) -> tuple:
    """`transformer.forward` of one token a row: hidden states, the cache, and the room with what live rows made."""
    if room is None:
        return *transformer.forward(start.arch, start.params, *args, **given), None
    hidden_r1d, cache, made = transformer.forward(start.arch, start.params, *args, **given, keep=True)
    return hidden_r1d, cache, kept.write(room, made, place_r, live_r)


def choose(start: Start, hidden_bd, keys_b, at, shaping: draw.Shaping) -> tuple[jax.Array, jax.Array]:
    """The tokens that follow hidden states, and their log-probs; `at`: tokens drawn before, of all rows or of each."""
    logits_bv = decoding.logits(start.arch, start.params, hidden_bd)
    keys_b = jax.vmap(jax.random.fold_in)(keys_b, jnp.broadcast_to(at, keys_b.shape))
    return draw.choose(keys_b, logits_bv, shaping)


def cache_lengths(width: int) -> list[int]:
    """The slots that a cache has in turn for completions of `width` tokens: each time about twice as many."""
    found, least = [width], LEAST_LENGTH[sharding.platform()]
    while len(found) < MOST_LENGTHS and found[0] >= 2 * least:
        found.insert(0, -(-found[0] // least) * least // 2)
    return found


def trips(width: int, steps: int) -> list[int]:
    """How often each loop of `together` runs where they make so many steps in all."""
    edges = [0, *cache_lengths(width)]
    return [min(max(steps - begin, 0), end - begin) for begin, end in itertools.pairwise(edges)]


def together(start: Start) -> tuple[jax.Array, jax.Array, jax.Array, kept.Room | None]:
    """Decodes all samples at once: tokens [b, t], padded, their log-probs, 0 at padding, steps in all, [], and what
    was kept."""
    rows, width, ends = start.keys_b.shape[0], start.width, start.ends
    spread = functools.partial(jnp.repeat, repeats=rows // start.lengths_p.shape[0], axis=0)
    start_b, shaping = spread(start.lengths_p), jax.tree.map(spread, start.shaping)

    def body(carry):
        at, token_b, done_b, cache, tokens_bt, logp_bt, room = carry
        place_b = jnp.arange(rows) * (width - 1) + at - 1
        hidden_b1d, cache, room = forward(
            start, room, place_b, ~done_b, token_b[:, None], (start_b + at - 1)[:, None],
            prefix=start.prefix, prefix_lengths_p=start.lengths_p, cache=cache, index=at - 1,
        )  # fmt: skip
        token_b, logp_b = choose(start, hidden_b1d[:, 0], start.keys_b, at, shaping)
        token_b = jnp.where(done_b, start.pad_id, token_b)
        tokens_bt = tokens_bt.at[:, at].set(token_b)
        logp_bt = logp_bt.at[:, at].set(jnp.where(done_b, 0.0, logp_b))
        return at + 1, token_b, done_b | jnp.isin(token_b, ends), cache, tokens_bt, logp_bt, room

    def unfinished(carry, length):
        return (carry[0] < min(length + 1, width)) & ~jnp.all(carry[2])

    token_b, logp_b = choose(start, sharding.constrain(spread(start.last_pd), "rows"), start.keys_b, 0, shaping)
    tokens_bt = sharding.constrain(jnp.full((rows, width), start.pad_id, jnp.int32).at[:, 0].set(token_b), "rows")
    logp_bt = sharding.constrain(jnp.zeros((rows, width), logp_b.dtype).at[:, 0].set(logp_b), "rows")
    cache = transformer.init_cache(start.arch, rows, 0)
    carry: Any = (jnp.int32(1), token_b, jnp.isin(token_b, ends), cache, tokens_bt, logp_bt, start.room)
    for length in cache_lengths(width):
        at, token_b, done_b, cache, *rest = carry
        carry = (at, token_b, done_b, transformer.grown(cache, length), *rest)
        carry = jax.lax.while_loop(functools.partial(unfinished, length=length), body, carry)
    at, _, _, _, tokens_bt, logp_bt, room = carry
    return tokens_bt, logp_bt, at - 1, room
