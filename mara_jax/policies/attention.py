"""Grouped-query attention with one softmax over a prefix that several rows share and the rows' own keys.

Written with its gradient: the parts of the softmax are never joined, weights stay unnormalised (the division by their
sum is left to the few channels of the output), and the backward pass needs no reduction over keys. It makes the weights
anew: they grow with the square of the length, and every layer would keep its own. The output is kept as the next matmul
takes it, which keeps it, too; otherwise XLA keeps the two products that it is the sum of.

x = (query head within its kv head, time), time fastest. With a prefix of p prompts, b / p consecutive rows share each.
Where the keys are the queries' own, times are attended in a few blocks, each of which leaves out the keys behind it.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import packing as streams
from mara_jax.policies import products
from mara_jax.policies.packing import Packing
from mara_jax.policies.parameters import Architecture, wide

# Finite, so that a masked score never makes a NaN; exp of it is exactly zero beside any real score.
MASKED = -1e30
# Batched matmuls of [b, k, x, c] and [b, k, s, h]: by keys (c = h), by values (c = s), and over the queries.
KEYS = (((3,), (3,)), ((0, 1), (0, 1)))
VALUES = (((3,), (2,)), ((0, 1), (0, 1)))
QUERIES = (((2,), (2,)), ((0, 1), (0, 1)))
# Of causal attention's square half is needed; in n blocks of times (n + 1) / 2n of it are made.
MOST_BLOCKS, LEAST_BLOCK = 4, 64


def by_kernels(arch: Architecture) -> bool:
    """Whether attention over whole rows is left to `flash`: on a GPU or TPU, in bfloat16, for heads that suit it."""
    if arch.attention != "auto":
        return arch.attention == "kernels"
    return sharding.platform() != "cpu" and arch.compute_dtype == "bfloat16" and arch.head_dim in (64, 128, 256)


def attend(q_bkxh, own, prefix=None, *, t: int | None = None, packing: Packing | None = None):
    """Attention over a shared prefix and the rows' own keys.

    args: q_bkxh: scaled queries; own: (k_bksh, v_bksh, mask broadcastable to [b, k, x, s]); prefix: None, or such a
        triple with p rows in place of b and a mask [p, s]; t, packing: as `laid_out` has them.
    returns: [b, k, x, h], or where t is given as `laid_out` returns it.
    """
    own_k, own_v, mask = own
    if prefix is None:
        return _attend(t, packing, q_bkxh, (own_k, own_v), None, (mask, None))
    prefix_k, prefix_v, seen_ps = prefix
    return _attend(t, packing, q_bkxh, (own_k, own_v), (prefix_k, prefix_v), (mask, seen_ps[:, None, None, :]))


def attend_group(prompts, rest, *, packing: Packing | None = None):
    """Attention over prompts, and over what follows them, whose prefix they are.

    args: prompts: (queries, keys, values, mask) as `attend` has them; rest: the same, and behind them a mask [p, s] of
        the prompts' keys; packing: of the rest.
    returns: [p s + the rest's positions, n h]: the prompts' rows one after the other, then those of the rest as
        `laid_out` has them.
    """
    *of_prompts, mask = prompts
    *of_rest, own_mask, seen_ps = rest
    return _attend_group(packing, tuple(of_prompts), tuple(of_rest), (mask, own_mask, seen_ps[:, None, None, :]))


def laid_out(out_bkxh, t: int, packing: Packing | None):
    """An output as the next matmul takes it: a token's heads together.

    args: t: times in x; packing: of the rows.
    returns: [b, t, n h], or streams [c, n, n h], whose empty slots are finite but arbitrary.
    """
    b, _, _, h = out_bkxh.shape
    out_btx = out_bkxh.reshape(b, -1, t, h).swapaxes(1, 2).reshape(b, t, -1)
    return out_btx if packing is None else streams.pack_only(out_btx, packing)


def _heads_first(y, k, t, packing, c):
    """The inverse of `laid_out` for c numbers a head: [b, k, x, c]."""
    y_btx = y if packing is None else streams.unpack(y, packing)
    return y_btx.reshape(y_btx.shape[0], t, -1, c).swapaxes(1, 2).reshape(y_btx.shape[0], k, -1, c)


def by_prompt(y_bkxc, prompts):
    """The samples of a prompt as more rows of one matmul with its keys: [p, k, (g, x), c]."""
    b, k, x, c = y_bkxc.shape
    return y_bkxc.reshape(prompts, b // prompts, k, x, c).swapaxes(1, 2).reshape(prompts, k, -1, c)


def by_row(y_pkyc, rows):
    """The inverse of `by_prompt`: [b, k, x, c]."""
    p, k, _, c = y_pkyc.shape
    return y_pkyc.reshape(p, k, rows // p, -1, c).swapaxes(1, 2).reshape(rows, k, -1, c)


def _dot(x, y, axes):
    return jax.lax.dot_general(x, y, axes, preferred_element_type=wide(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(t, packing, q, own, prefix, masks):
    return _attend_fwd(t, packing, q, own, prefix, masks)[0]


def _blocks(t: int | None, s: int) -> list[tuple[int, int]]:
    """The times that are attended together: from, and up to."""
    count = 1 if t is None or t != s else max(1, min(MOST_BLOCKS, t // LEAST_BLOCK))
    edges = [s * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _cut(block, t, own, mask, *of_queries):
    """Own keys and values up to a block's end, their mask, and what is of queries [b, k, x, c] at the block's times."""
    start, end = block
    at_block = lambda y: y.reshape(*y.shape[:2], -1, t, y.shape[-1])[:, :, :, start:end]  # noqa: E731
    cut = [at_block(y).reshape(*y.shape[:2], -1, y.shape[-1]) for y in of_queries]
    seen = mask.reshape(-1, t, mask.shape[-1])[:, start:end, :end].reshape(-1, end)
    return tuple(y[:, :, :end] for y in own), seen, cut


def _joined(of_blocks, blocks):
    """What `_cut` cut, [b, k, x, c], of all blocks."""
    lengths = [end - start for start, end in blocks]
    each = [y.reshape(*y.shape[:2], -1, t, y.shape[-1]) for y, t in zip(of_blocks, lengths, strict=True)]
    whole = jnp.concatenate(each, axis=3)
    return whole.reshape(*whole.shape[:2], -1, whole.shape[-1])


def _forward(q, own, prefix, masks, t):
    """Output, and each row's highest score and sum of weights; weights are exp(score - the highest)."""
    if len(blocks := _blocks(t, own[0].shape[2])) == 1:
        return _forward_block(q, own, prefix, masks)
    found = []
    for block in blocks:
        seen_own, mask, (cut_q,) = _cut(block, t, own, masks[0], q)
        found.append(_forward_block(cut_q, seen_own, prefix, (mask, masks[1])))
    return tuple(_joined(each, blocks) for each in zip(*found, strict=True))


def _forward_block(q, own, prefix, masks):
    b = q.shape[0]
    score = _scores(q, own[0], masks[0])
    top = jnp.max(score, axis=-1, keepdims=True)
    if prefix is None:
        weight = jnp.exp(score - top)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        return (_dot(weight.astype(q.dtype), own[1], VALUES) / total).astype(q.dtype), top, total
    p = prefix[0].shape[0]
    shared = _scores(by_prompt(q, p), prefix[0], masks[1])
    top = jnp.maximum(top, by_row(jnp.max(shared, axis=-1, keepdims=True), b))
    weight, weight_shared = jnp.exp(score - top), jnp.exp(shared - by_prompt(top, p))
    total = jnp.sum(weight, axis=-1, keepdims=True) + by_row(jnp.sum(weight_shared, axis=-1, keepdims=True), b)
    out = _dot(weight.astype(q.dtype), own[1], VALUES)
    out += by_row(_dot(weight_shared.astype(q.dtype), prefix[1], VALUES), b)
    return (out / total).astype(q.dtype), top, total


def _scores(q, keys, mask):
    return jnp.where(mask, _dot(q, keys, KEYS), MASKED)


def _attend_fwd(t, packing, q, own, prefix, masks):
    out, top, total = _forward(q, own, prefix, masks, t)
    out = out if t is None else laid_out(out, t, packing)
    return out, (packing, q, own, prefix, masks, out, top, total)


def _attend_bwd(t, saved, g):
    packing, q, own, prefix, masks, out, *sums = saved
    along = _along(g, out, q.shape[-1], sums[1].dtype)
    both = (g, along) if t is None else _both_heads_first((g, along), q, t, packing)
    return None, *_backward(q, own, prefix, masks, sums, both, t), (None, None)


def _along(g, out, h, dtype):
    """Each head's sum over channels of an output times its gradient, as the output is laid out: [..., n]."""
    return jnp.sum((g.astype(dtype) * out).reshape(*g.shape[:-1], -1, h), axis=-1)


def _both_heads_first(both, q, t, packing):
    back = functools.partial(_heads_first, k=q.shape[1], t=t, packing=packing)
    return [back(y, c=c) for y, c in zip(both, (q.shape[-1], 1), strict=True)]


def _backward(q, own, prefix, masks, sums, both, t) -> tuple[Any, Any, Any]:
    """Gradients by queries, by own keys and values, and by those of the prefix."""
    if len(blocks := _blocks(t, own[0].shape[2])) == 1:
        return _backward_block(q, own, prefix, masks, sums, both)
    if products.one_cpu():  # XLA would keep the forward pass's cuts of these
        q, *own = (products.after(y, both[0]) for y in (q, *own))
    found = []
    for block in blocks:
        seen_own, mask, (cut_q, *cut) = _cut(block, t, own, masks[0], q, *sums, *both)
        d_q, d_own, d_prefix = _backward_block(cut_q, seen_own, prefix, (mask, masks[1]), cut[:2], cut[2:])
        found.append((d_q, tuple(jnp.pad(y, ((0, 0), (0, 0), (0, t - block[1]), (0, 0))) for y in d_own), d_prefix))
    d_qs, *of_keys = zip(*found, strict=True)
    return _joined(d_qs, blocks), *(jax.tree.map(lambda *each: sum(each), *each) for each in of_keys)


def _backward_block(q, own, prefix, masks, sums, both) -> tuple[Any, Any, Any]:
    (top, total), (g, along) = sums, both
    q = products.after(q, g)
    g, along = g.astype(total.dtype) / total, along / total
    d_q, *d_own = _one_side(q, own, masks[0], top, g, along)
    if prefix is None:
        return d_q.astype(q.dtype), tuple(d_own), None
    turned = functools.partial(by_prompt, prompts=prefix[0].shape[0])
    d_shared, *d_prefix = _one_side(turned(q), prefix, masks[1], turned(top), turned(g), turned(along))
    d_q += by_row(d_shared, q.shape[0])
    return d_q.astype(q.dtype), tuple(d_own), tuple(d_prefix)


def _one_side(q, keys_values, mask, top, g, along):
    """Gradients by queries, keys and values of one set of keys; g is divided by the weights' sum."""
    keys, values = keys_values
    weight = jnp.exp(_scores(q, keys, mask) - top)
    g_narrow, narrow = g.astype(q.dtype), weight.astype(q.dtype)
    d_score = (weight * (_dot(g_narrow, values, KEYS) - along)).astype(q.dtype)
    d_values = _dot(narrow, g_narrow, QUERIES)
    d_keys = _dot(d_score, q, QUERIES)
    return _dot(d_score, keys, VALUES), d_keys.astype(keys.dtype), d_values.astype(values.dtype)


_attend.defvjp(_attend_fwd, _attend_bwd)


@jax.custom_vjp
def _attend_group(packing, prompts, rest, masks):
    return _attend_group_fwd(packing, prompts, rest, masks)[0]


def _times(own) -> int:
    return own[0].shape[2]  # without a cache there is a key for each query


def _attend_group_fwd(packing, prompts, rest, masks):
    (prompts_q, *shared), (q, *own), (prompts_mask, *rest_masks) = prompts, rest, masks
    s, t = _times(shared), _times(own)
    prompts_out, *prompts_sums = _forward(prompts_q, shared, None, (prompts_mask, None), s)
    rest_out, *rest_sums = _forward(q, own, shared, rest_masks, t)
    both = laid_out(prompts_out, s, None), laid_out(rest_out, t, packing)
    out = jnp.concatenate([y.reshape(-1, y.shape[-1]) for y in both])
    return out, (packing, prompts, rest, masks, out, prompts_sums, rest_sums)


def _attend_group_bwd(saved, g):
    packing, (prompts_q, *shared), (q, *own), (prompts_mask, *rest_masks), out, prompts_sums, rest_sums = saved
    p, s, t = prompts_q.shape[0], _times(shared), _times(own)
    lead = (-1, t) if packing is None else packing.place_cn.shape
    along = _along(g, out, q.shape[-1], rest_sums[1].dtype)
    cut = [jnp.split(y, [p * s]) for y in (g, along)]
    of_prompts = _both_heads_first([y.reshape(p, s, y.shape[-1]) for y, _ in cut], prompts_q, s, None)
    of_rest = _both_heads_first([y.reshape(*lead, y.shape[-1]) for _, y in cut], q, t, packing)
    d_q, d_own, d_shared = _backward(q, own, shared, rest_masks, rest_sums, of_rest, t)
    of = (prompts_q, shared, None, (prompts_mask, None), prompts_sums, of_prompts, s)
    d_prompts_q, d_prompts_own, _ = _backward(*of)
    d_keys, d_values = (one + other for one, other in zip(d_prompts_own, d_shared, strict=True))
    return None, (d_prompts_q, d_keys, d_values), (d_q, *d_own), None


_attend_group.defvjp(_attend_group_fwd, _attend_group_bwd)
