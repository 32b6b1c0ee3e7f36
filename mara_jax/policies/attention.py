"""Grouped-query attention with one softmax over a prefix that several rows share and the rows' own keys.

Written with its gradient: the parts of the softmax are never joined, weights stay unnormalised (the division by their
sum is left to the few channels of the output), and the backward pass needs no reduction over keys. It makes the weights
anew: they grow with the square of the length, and every layer would keep its own. The output is kept as the next matmul
takes it, which keeps it, too; otherwise XLA keeps the two products that it is the sum of.

x = (query head within its kv head, time), time fastest. With a prefix of p prompts, b / p consecutive rows share each.
"""

import functools

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import packing as streams
from mara_jax.policies import products
from mara_jax.policies.packing import Packing
from mara_jax.policies.params import Architecture, wide

# Finite, so that a masked score never makes a NaN; exp of it is exactly zero beside any real score.
MASKED = -1e30
# Batched matmuls of [b, k, x, c] and [b, k, s, h]: by keys (c = h), by values (c = s), and over the queries.
KEYS = (((3,), (3,)), ((0, 1), (0, 1)))
VALUES = (((3,), (2,)), ((0, 1), (0, 1)))
QUERIES = (((2,), (2,)), ((0, 1), (0, 1)))


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


def _forward(q, own, prefix, masks):
    """Output, and each row's highest score and sum of weights; weights are exp(score - the highest)."""
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
    out, top, total = _forward(q, own, prefix, masks)
    out = out if t is None else laid_out(out, t, packing)
    return out, (packing, q, own, prefix, masks, out, top, total)


def _attend_bwd(t, saved, g):
    packing, q, own, prefix, masks, out, top, total = saved
    h = q.shape[-1]
    along = jnp.sum((g.astype(total.dtype) * out).reshape(*g.shape[:-1], -1, h), axis=-1)
    if t is not None:
        back = functools.partial(_heads_first, k=q.shape[1], t=t, packing=packing)
        g, along = back(g, c=h), back(along, c=1)
    q = products.after(q, g)
    g, along = g.astype(total.dtype) / total, along / total
    d_q, *d_own = _one_side(q, own, masks[0], top, g, along)
    if prefix is None:
        return None, d_q.astype(q.dtype), tuple(d_own), None, (None, None)
    turned = functools.partial(by_prompt, prompts=prefix[0].shape[0])
    d_shared, *d_prefix = _one_side(turned(q), prefix, masks[1], turned(top), turned(g), turned(along))
    d_q += by_row(d_shared, q.shape[0])
    return None, d_q.astype(q.dtype), tuple(d_own), tuple(d_prefix), (None, None)


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
