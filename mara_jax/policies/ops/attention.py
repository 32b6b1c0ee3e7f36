"""Grouped-query attention with one softmax over a prompt's keys, which its samples share, and a row's own keys.

Of queries [b, k, x, h], k counts kv heads and x = (query head of that kv head, time), time fastest. With a prefix of p
prompts, b / p consecutive rows share each: their queries become more rows of one matmul, and the prompt's keys and
values are never repeated.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.parallel import sharding
from mara_jax.policies.parameters import wide

# Finite, so that a masked score never makes a NaN; exp of it is exactly zero beside any real score.
MASKED = -1e30
# The name under which `jax.checkpoint` may save what attention's gradient needs.
SAVED = "attention"

KeysValues = tuple[jax.Array, jax.Array]  # each [rows, k, s, h]


class Mask(NamedTuple):
    """Which keys a query sees.

    own: bool, broadcastable to [b, k, x, s]; prefix_ps: bool, where there is a prefix; lengths_b (None: all tokens) and
    prefix_lengths_p: the same as numbers of tokens. Only `attention` reads `own` for what it is. Without a cache the
    CPU's form leaves out the keys behind a block of queries, and the kernels read the lengths alone: both take `own` to
    be causal, so that another kind of mask has to change all three.
    """

    own: jax.Array
    prefix_ps: jax.Array | None = None
    lengths_b: jax.Array | None = None
    prefix_lengths_p: jax.Array | None = None


def attention(q_bkxh: jax.Array, own: KeysValues, prefix: KeysValues | None, mask: Mask) -> jax.Array:
    """softmax(q keys^T) values over own and prefix keys: [b, k, x, h]; q is scaled already, the softmax float32."""
    rows = q_bkxh.shape[0]
    score = masked_scores(q_bkxh, own[0], mask.own)
    if prefix is None or mask.prefix_ps is None:
        return weighted_sum(jax.nn.softmax(score), own[1], q_bkxh.dtype).astype(q_bkxh.dtype)
    prompts, _, slots, _ = prefix[0].shape
    score_shared = masked_scores(by_prompt(q_bkxh, prompts), prefix[0], mask.prefix_ps[:, None, None, :])
    weight = jax.nn.softmax(jnp.concatenate([by_row(score_shared, rows), score], axis=-1))
    weight_shared, weight_own = jnp.split(weight, [slots], axis=-1)
    out = weighted_sum(weight_own, own[1], q_bkxh.dtype)
    out += by_row(weighted_sum(by_prompt(weight_shared, prompts), prefix[1], q_bkxh.dtype), rows)
    return out.astype(q_bkxh.dtype)


def causal_mask(t: int, heads: int) -> Any:
    """The mask [x, t] of t tokens that see each other up to themselves; heads: query heads of a kv head."""
    return np.tile(np.arange(t) <= np.arange(t)[:, None], (heads, 1))


def cache_mask(t: int, heads: int, slots: int, index: Any, counts_b: Any = None) -> jax.Array:
    """The mask of t tokens that are written to a KV cache of so many slots, from `index` on.

    args: counts_b: where given the cache is a ring, of whose slots a row sees so many, the last of them `index`.
    returns: [x, slots], or of a ring [b, 1, 1, slots].
    """
    slot_s = jnp.arange(slots)
    if counts_b is not None:
        return ((index - slot_s) % slots < counts_b[:, None])[:, None, None, :]
    return jnp.tile(slot_s <= index + jnp.arange(t)[:, None], (heads, 1))


def behind_prefix(mask: Mask, slots: int, lengths_p: jax.Array) -> Mask:
    """The mask of tokens that also see their prompt's first `lengths_p` of so many slots."""
    return mask._replace(prefix_ps=jnp.arange(slots) < lengths_p[:, None], prefix_lengths_p=lengths_p)


def masked_scores(q_bkxh: jax.Array, keys_bksh: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores [b, k, x, s] in float32 (or wider)."""
    score = jnp.einsum("bkxh,bksh->bkxs", q_bkxh, keys_bksh, preferred_element_type=wide(q_bkxh.dtype))
    return jnp.where(mask, score, MASKED)


def weighted_sum(weight_bkxs: jax.Array, values_bksh: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Values by weights rounded to a compute dtype: [b, k, x, h] in float32 (or wider)."""
    return jnp.einsum("bkxs,bksh->bkxh", weight_bkxs.astype(dtype), values_bksh, preferred_element_type=wide(dtype))


def by_prompt(y_bkxc: jax.Array, prompts: int) -> jax.Array:
    """A prompt's samples as more rows of one matmul with its keys: [p, k, (g, x), c]."""
    b, k, x, c = y_bkxc.shape
    return y_bkxc.reshape(prompts, b // prompts, k, x, c).swapaxes(1, 2).reshape(prompts, k, -1, c)


def by_row(y_pkyc: jax.Array, rows: int) -> jax.Array:
    """The inverse of `by_prompt`: [b, k, x, c]."""
    p, k, _, c = y_pkyc.shape
    return y_pkyc.reshape(p, k, rows // p, -1, c).swapaxes(1, 2).reshape(rows, k, -1, c)


def heads_first(q_btnh, k_btkh, v_btkh):
    """Queries [b, k, x, h], keys and values [b, k, t, h]; x: (query head of a kv head, time)."""
    (b, t, n, h), k = q_btnh.shape, k_btkh.shape[2]
    # Where kv heads stay whole, the query heads of each are sharded instead.
    whole = sharding.shard_count("kv_heads") == 1 and n // k % sharding.shard_count("heads") == 0
    axes = ("rows", None, "heads") if whole else ("rows", "kv_heads")
    q_bkxh = sharding.constrain(q_btnh.transpose(0, 2, 1, 3).reshape(b, k, n // k * t, h), *axes)
    return q_bkxh, *(sharding.constrain(y.transpose(0, 2, 1, 3), "rows", "kv_heads") for y in (k_btkh, v_btkh))


def tokens_first(out_bkxh, shape_btnh):
    """[b, t, n h]: a token's heads together."""
    b, t, n, h = shape_btnh
    return out_bkxh.reshape(b, n, t, h).swapaxes(1, 2).reshape(b, t, n * h)
