"""The head's statistics where its matrix is cut over devices: one block of the vocabulary after another.

A block is gathered, used for all positions and dropped; in the backward pass its gradient goes to its parts at once.
So no device ever holds the matrix or its gradient whole: cut over many, these would outweigh all else that one keeps.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import vocabulary
from mara_jax.policies.parameters import wide

# Float32 logits of one stream of positions held at once: 64 MB. Narrower blocks than WIDTH would cost more time for
# adding up the gradients of hidden states than for the matmuls.
MAX_LOGITS = 16_000_000
WIDTH = 1024


class Sums(NamedTuple):
    """Over the words seen so far, at each position [r, n, t], of the vocabulary's t parts by themselves.

    top: the highest logit; total, weighted: sums of exp(logit - top) and of that times the logit; chosen: the given
    token's logit, 0 where it is not among the words.
    """

    top: jax.Array
    total: jax.Array
    weighted: jax.Array
    chosen: jax.Array


class RefSums(NamedTuple):
    """As `Sums`, of the reference; gap: the policy's sum of exp(logit - top) times the logits' difference."""

    top: jax.Array
    total: jax.Array
    gap: jax.Array
    chosen: jax.Array


def blocks(positions: int, vocab: int) -> int:
    """Into how many blocks the layout in use takes the vocabulary; 0 where the matrix is not cut, or not so.

    args: positions: of one stream; vocab: words.
    """
    parts = sharding.shard_count("vocab")
    if sharding.shard_count("embed") == 1 or vocab % parts:
        return 0
    words = vocab // parts
    wanted = words / min(words, max(WIDTH, MAX_LOGITS // positions))
    count = min((n for n in range(1, words + 1) if words % n == 0), key=lambda n: abs(math.log(n / wanted)))
    return count if count > wanted / 4 else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def stats(
    count: int, without_token: vocabulary.Ranges, rows_vd: jax.Array, hidden_rnd: jax.Array, tokens_rn, ref: Any
) -> tuple:
    """(logp, entropy, ref_logp, kl) of tokens, each [r, n] (nats); only logp has a gradient.

    args: count: blocks, a divisor of each part of the vocabulary; without_token: as of the architecture; rows_vd: the
        head's matrix; hidden_rnd: the hidden states that predict the tokens; ref: (matrix, hidden states) of the
        reference, or None: its two are None then.
    """
    return _fwd(count, without_token, rows_vd, hidden_rnd, tokens_rn, ref)[0]


def _cut(count: int, rows_vd):
    """[v, d] as [count, t, w, d]: a block has its share of each of the t parts, which stay where they are."""
    parts = sharding.shard_count("vocab")
    cut = rows_vd.reshape(parts, count, -1, rows_vd.shape[1]).swapaxes(0, 1)
    return sharding.constrain(cut, None, "vocab", None, "embed")


def _known(count: int, without_token: vocabulary.Ranges, vocab_size: int) -> jax.Array:
    """Where the blocks have a token, [count, t, w]."""
    known_v = vocabulary.known(without_token, vocab_size)
    return jnp.asarray(known_v.reshape(sharding.shard_count("vocab"), count, -1).swapaxes(0, 1))


def _logits(hidden_rnd, rows_twd, known_tw):
    """The logits [r, n, t, w] of a block, and the block as the devices have gathered it, in the compute dtype."""
    rows_twd = sharding.constrain(rows_twd.astype(hidden_rnd.dtype), "vocab")
    dims = (((2,), (2,)), ((), ()))
    out = jax.lax.dot_general(hidden_rnd, rows_twd, dims, preferred_element_type=wide(hidden_rnd.dtype))
    out = sharding.constrain(out, "rows", None, "vocab")
    return jnp.where(known_tw, out, vocabulary.LEAST), rows_twd


def _is_token(tokens_rn, number, count: int, shape: tuple[int, ...]):
    """Where among the logits of a block the given tokens are."""
    _, _, t, w = shape
    first_t = (jnp.arange(t) * count + number) * w
    at_rnt = tokens_rn[..., None] - first_t
    return at_rnt[..., None] == jax.lax.broadcasted_iota(jnp.int32, shape, 3)


def _fwd(count, without_token, rows_vd, hidden_rnd, tokens_rn, ref):
    cut, ref_cut = _cut(count, rows_vd), None if ref is None else jax.lax.stop_gradient(_cut(count, ref[0]))

    def add(carry: tuple[Sums, RefSums | None], xs):
        (sums, ref_sums), (number, known_tw, rows_twd, ref_twd) = carry, xs
        logits, _ = _logits(hidden_rnd, rows_twd, known_tw)
        chosen = _is_token(tokens_rn, number, count, logits.shape)
        top = jnp.maximum(sums.top, jnp.max(logits, axis=-1))
        before, weight = jnp.exp(sums.top - top), jnp.exp(logits - top[..., None])
        new = Sums(
            top,
            sums.total * before + _over(weight),
            sums.weighted * before + _over(weight * logits),
            sums.chosen + _over(jnp.where(chosen, logits, 0)),
        )
        if ref is None or ref_sums is None:
            return (new, None), None
        ref_logits, _ = _logits(ref[1], ref_twd, known_tw)
        ref_top = jnp.maximum(ref_sums.top, jnp.max(ref_logits, axis=-1))
        ref_new = RefSums(
            ref_top,
            ref_sums.total * jnp.exp(ref_sums.top - ref_top) + _over(jnp.exp(ref_logits - ref_top[..., None])),
            ref_sums.gap * before + _over(weight * (logits - ref_logits)),
            ref_sums.chosen + _over(jnp.where(chosen, ref_logits, 0)),
        )
        return (new, ref_new), None

    shape, dtype = (*tokens_rn.shape, cut.shape[1]), wide(hidden_rnd.dtype)
    none, least = (sharding.constrain(jnp.full(shape, x, dtype), "rows", None, "vocab") for x in (0, -jnp.inf))
    begin = (Sums(least, none, none, none), None if ref is None else RefSums(least, none, none, none))
    known = _known(count, without_token, rows_vd.shape[0])
    (sums, ref_sums), _ = jax.lax.scan(add, begin, (jnp.arange(count), known, cut, ref_cut))
    out, lse_rn = _joined(sums, ref_sums)
    return out, (rows_vd, hidden_rnd, tokens_rn, lse_rn)


def _over(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1)


def _joined(sums: Sums, ref: RefSums | None):
    """The statistics, and the logarithm of the sum of exponentials, from those of the vocabulary's parts."""
    top = jnp.max(sums.top, axis=-1, keepdims=True)
    share = jnp.exp(sums.top - top)
    total = _over(sums.total * share)
    lse = top[..., 0] + jnp.log(total)
    logp, entropy = _over(sums.chosen) - lse, lse - _over(sums.weighted * share) / total
    if ref is None:
        return (logp, entropy, None, None), lse
    ref_lse = jax.nn.logsumexp(ref.top + jnp.log(ref.total), axis=-1)
    kl = _over(ref.gap * share) / total - lse + ref_lse
    return (logp, entropy, _over(ref.chosen) - ref_lse, kl), lse


def _bwd(count, without_token, saved, g):
    rows_vd, hidden_rnd, tokens_rn, lse_rn = saved
    g_rn, lse_rn = (x[..., None, None] for x in (g[0], lse_rn))

    def add(d_hidden_trnd, xs):
        number, known_tw, rows_twd = xs
        logits, rows_twd = _logits(hidden_rnd, rows_twd, known_tw)
        chosen = _is_token(tokens_rn, number, count, logits.shape)
        d_logits = (g_rn * (chosen - jnp.exp(logits - lse_rn))).astype(hidden_rnd.dtype)
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=logits.dtype)
        d_hidden_trnd += dot(d_logits, rows_twd, (((3,), (1,)), ((2,), (0,))))
        d_rows_twd = dot(d_logits, hidden_rnd, (((0, 1), (0, 1)), ((), ())))
        return d_hidden_trnd, sharding.constrain(d_rows_twd, "vocab", None, "embed").astype(rows_vd.dtype)

    cut = _cut(count, rows_vd)
    zeros = jnp.zeros((cut.shape[1], *hidden_rnd.shape), wide(hidden_rnd.dtype))
    blocks = (jnp.arange(count), _known(count, without_token, rows_vd.shape[0]), cut)
    d_hidden_trnd, d_rows_ktwd = jax.lax.scan(add, sharding.constrain(zeros, "vocab", "rows"), blocks)
    d_rows_vd = sharding.constrain(d_rows_ktwd.swapaxes(0, 1).reshape(rows_vd.shape), "vocab", "embed")
    return d_rows_vd, jnp.sum(d_hidden_trnd, axis=0).astype(hidden_rnd.dtype), None, None


stats.defvjp(_fwd, _bwd)
