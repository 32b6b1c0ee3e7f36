"""What a policy's head says of given tokens, without an array of the size of positions times vocabulary.

Log-prob, entropy and the exact KL to a reference at every position, in chunks of positions: the logits of a chunk
are made, reduced and dropped, and made once more in the backward pass (once only where one chunk holds them all).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import products, transformer
from mara_jax.policies.params import wide

# Float32 logits of one stream of positions held at once: 32 MB.
MAX_LOGITS = 8_000_000


class Stats(NamedTuple):
    """At each position, float32 nats: logp of the given token, entropy of the policy; and where there is a reference
    its logp of the token, ref_logp, and the exact kl, KL(pi || ref) over the vocabulary. Only logp has a gradient."""

    logp: jax.Array
    entropy: jax.Array
    ref_logp: jax.Array | None
    kl: jax.Array | None


def token_stats(
    arch: transformer.Architecture,
    params: Any,
    hidden_rnd: jax.Array,
    tokens_rn: jax.Array,
    *,
    ref_params: Any = None,
    ref_hidden_rnd: jax.Array | None = None,
    streams: int = 1,
) -> Stats:
    """The head's statistics of tokens, each [r, n] float32 (nats).

    Summed over a completion's positions, the KL is an unbiased estimate of the sequence's with far less variance than
    the log-ratio of the tokens that happened to be drawn.

    Args:
      arch: static.
      params, ref_params: hold the head; the reference's may be left out, with its hidden states.
      hidden_rnd, ref_hidden_rnd: the hidden states that predict the tokens.
      tokens_rn: ids.
      streams: how many of the r rows lie on different devices; the chunks are as much larger.
    """
    n = tokens_rn.shape[1]
    chunks = min(n, -(-tokens_rn.size * arch.vocab_size // (MAX_LOGITS * streams)))
    ref = (
        None if ref_params is None else jax.lax.stop_gradient((transformer.head_rows(arch, ref_params), ref_hidden_rnd))
    )
    out: Any = _stats(chunks, streams, transformer.head_rows(arch, params), hidden_rnd, tokens_rn, ref)
    return Stats(*out)


def _gathered(rows_vd, dtype) -> Any:
    """The head's matrix as chunks read it: in the compute dtype and, but for the vocabulary, whole on every device.

    Left to themselves, the chunks would each fetch it anew.
    """
    return None if rows_vd is None else sharding.constrain(rows_vd.astype(dtype), "vocab")


def _logits(hidden_rcd, rows_vd):
    out = jax.lax.dot_general(
        hidden_rcd, rows_vd, (((2,), (1,)), ((), ())), preferred_element_type=wide(hidden_rcd.dtype)
    )
    return sharding.constrain(out, "rows", None, "vocab")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stats(chunks, streams, rows_vd, hidden_rnd, tokens_rn, ref):
    return _stats_fwd(chunks, streams, rows_vd, hidden_rnd, tokens_rn, ref)[0]


def _of_chunk(rows_vd, ref_rows_vd, hidden_rcd, tokens_rc, ref_hidden_rcd):
    """((logp, entropy, ref_logp, kl), lse) of a chunk, and its logits."""
    logits_rcv = _logits(hidden_rcd, rows_vd)
    top_rc1 = jnp.max(logits_rcv, axis=-1, keepdims=True)
    weight_rcv = jnp.exp(logits_rcv - top_rc1)
    total_rc = jnp.sum(weight_rcv, axis=-1)
    lse_rc = top_rc1[..., 0] + jnp.log(total_rc)
    entropy_rc = lse_rc - jnp.sum(weight_rcv * logits_rcv, axis=-1) / total_rc
    ref_logp_rc = kl_rc = None
    if ref_rows_vd is not None:
        ref_rcv = _logits(ref_hidden_rcd, ref_rows_vd)
        ref_lse_rc = jax.nn.logsumexp(ref_rcv, axis=-1)
        ref_logp_rc = _chosen(ref_rcv, tokens_rc) - ref_lse_rc
        kl_rc = jnp.sum(weight_rcv * (logits_rcv - ref_rcv), axis=-1) / total_rc - lse_rc + ref_lse_rc
    logp_rc = _chosen(logits_rcv, tokens_rc) - lse_rc
    return ((logp_rc, entropy_rc, ref_logp_rc, kl_rc), lse_rc), logits_rcv


def _chosen(logits_rcv, tokens_rc):
    return jnp.take_along_axis(logits_rcv, tokens_rc[..., None], axis=-1)[..., 0]


def _cut(chunks, x_rn):
    """[r, n, ...] as [chunks, r, c, ...], zeros at the end."""
    r, n = x_rn.shape[:2]
    size = -(-n // chunks)
    padded = jnp.pad(x_rn, ((0, 0), (0, chunks * size - n), *((0, 0),) * (x_rn.ndim - 2)))
    return jnp.moveaxis(padded.reshape(r, chunks, size, *x_rn.shape[2:]), 1, 0)


def _joined(n, x_krc):
    """The inverse of _cut."""
    x_rkc = jnp.moveaxis(x_krc, 0, 1)
    return x_rkc.reshape(x_rkc.shape[0], -1, *x_rkc.shape[3:])[:, :n]


def _stats_fwd(chunks, streams, rows_vd, hidden_rnd, tokens_rn, ref):
    ref_rows_vd, ref_hidden_rnd = (None, None) if ref is None else ref
    whole_vd, ref_whole_vd = (_gathered(x, hidden_rnd.dtype) for x in (rows_vd, ref_rows_vd))
    of_chunk = functools.partial(_of_chunk, whole_vd, ref_whole_vd)
    if chunks == 1:
        (out, lse_rn), logits_rnv = of_chunk(hidden_rnd, tokens_rn, ref_hidden_rnd)
    else:
        cut = jax.tree.map(functools.partial(_cut, chunks), (hidden_rnd, tokens_rn, ref_hidden_rnd))
        out, lse_rn = jax.lax.map(lambda xs: of_chunk(*xs)[0], cut)
        out, lse_rn = jax.tree.map(functools.partial(_joined, tokens_rn.shape[1]), (out, lse_rn))
        logits_rnv = None
    return out, (rows_vd, hidden_rnd, tokens_rn, lse_rn, logits_rnv)


def _stats_bwd(chunks, streams, saved, g):
    rows_vd, hidden_rnd, tokens_rn, lse_rn, logits_rnv = saved
    g_rn = g[0]
    whole_vd = _gathered(rows_vd, hidden_rnd.dtype)

    def of_chunk(hidden_rcd, tokens_rc, lse_rc, g_rc, logits_rcv):
        logits_rcv = _logits(hidden_rcd, whole_vd) if logits_rcv is None else logits_rcv
        hit_rcv = tokens_rc[..., None] == jnp.arange(rows_vd.shape[0])
        d_rcv = g_rc[..., None] * (hit_rcv - jnp.exp(logits_rcv - lse_rc[..., None]))
        d_rcv = d_rcv.astype(hidden_rcd.dtype)
        d_hidden_rcd = jax.lax.dot_general(d_rcv, whole_vd, (((2,), (0,)), ((), ())))
        if streams == 1:
            return products.over_rows(d_rcv, hidden_rcd, wide(d_rcv.dtype))[None], d_hidden_rcd
        # Each stream's own sum: were they added up here, devices would exchange the whole of it in every chunk.
        d_sxv, hidden_sxd = (x.reshape(streams, -1, x.shape[-1]) for x in (d_rcv, hidden_rcd))
        contract = (((1,), (1,)), ((0,), (0,)))
        d_rows_svd = jax.lax.dot_general(d_sxv, hidden_sxd, contract, preferred_element_type=wide(d_rcv.dtype))
        return sharding.constrain(d_rows_svd, "rows", "vocab"), d_hidden_rcd

    if chunks == 1:
        d_rows_svd, d_hidden_rnd = of_chunk(hidden_rnd, tokens_rn, lse_rn, g_rn, logits_rnv)
    else:

        def add(total_svd, xs):
            hidden_rcd, tokens_rc, lse_rc, g_rc = xs
            d_rows_svd, d_hidden_rcd = of_chunk(hidden_rcd, tokens_rc, lse_rc, g_rc, None)
            return total_svd + d_rows_svd, d_hidden_rcd

        cut = jax.tree.map(functools.partial(_cut, chunks), (hidden_rnd, tokens_rn, lse_rn, g_rn))
        none_svd = sharding.constrain(jnp.zeros((streams, *rows_vd.shape), wide(hidden_rnd.dtype)), "rows", "vocab")
        d_rows_svd, d_hidden_krcd = jax.lax.scan(add, none_svd, cut)
        d_hidden_rnd = _joined(tokens_rn.shape[1], d_hidden_krcd)
    d_rows_vd = sharding.constrain(jnp.sum(d_rows_svd, axis=0), "vocab", "embed")
    return d_rows_vd.astype(rows_vd.dtype), d_hidden_rnd.astype(hidden_rnd.dtype), None, None


_stats.defvjp(_stats_fwd, _stats_bwd)
