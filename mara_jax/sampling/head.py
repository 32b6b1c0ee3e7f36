"""What a policy's head says of given tokens, with no more logits at once than a chunk's.

Log-prob, entropy and the exact KL to a reference at every position, in chunks of positions: the logits of a chunk
are made, reduced and dropped, and made once more in the backward pass (once only where one chunk holds them all).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import transformer, vocabulary
from mara_jax.policies.ops import cpu
from mara_jax.policies.ops.select import on_one_cpu
from mara_jax.policies.parameters import wide
from mara_jax.sampling import sharded_head

# Float32 logits of one stream of positions held at once: 32 MB on a CPU. An accelerator reads the whole head for each
# chunk, and adds to the whole of its gradient: 512 and 256 MB make that about as expensive as a chunk's matmuls.
MAX_LOGITS = {"cpu": 8_000_000, "gpu": 2**27, "tpu": 2**26}
# On one CPU several chunks have a 24th as many positions as there are words, few enough for the matmul whose result has
# the vocabulary first, see `_axis` (a fifth faster than three large chunks at 2,016 positions of 8,192 words).
FEW = 24


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
    n, rows_vd = tokens_rn.shape[1], transformer.head_rows(arch, params)
    ref = (
        None if ref_params is None else jax.lax.stop_gradient((transformer.head_rows(arch, ref_params), ref_hidden_rnd))
    )
    blocks = sharded_head.blocks(-(-tokens_rn.size // sharding.shard_count("rows")), arch.vocab_size)
    if blocks:
        stats: Any = sharded_head.stats(blocks, arch.without_token, rows_vd, hidden_rnd, tokens_rn, ref)
        return Stats(*stats)
    chunks = min(n, -(-tokens_rn.size // _positions(tokens_rn.size, arch.vocab_size, streams)))
    out: Any = _stats(chunks, streams, arch.without_token, rows_vd, hidden_rnd, tokens_rn, ref)
    return Stats(*out)


def _positions(count: int, vocab: int, streams: int) -> int:
    """How many of `count` positions a chunk has at most."""
    most = max(1, int(MAX_LOGITS[sharding.platform()] * streams) // vocab)
    few = vocab // FEW
    return few if on_one_cpu() and count > most > few >= 256 else most


def _gathered(rows_vd, dtype) -> Any:
    """The head's matrix as chunks read it: in the compute dtype and, but for the vocabulary, whole on every device.

    Left to themselves, the chunks would each fetch it anew.
    """
    return None if rows_vd is None else sharding.constrain(rows_vd.astype(dtype), "vocab")


def _axis(hidden_rcd, rows_vd) -> int:
    """Where the vocabulary lies in the logits of a chunk: last, [r, c, v], or first, [v, r, c].

    First on a CPU where it is much longer than the chunk: one matmul then has its many outputs as rows (on two threads
    five times as fast), and sums over the vocabulary run along the tokens.
    """
    rows = hidden_rcd.shape[0] * hidden_rcd.shape[1]
    return 0 if on_one_cpu() and rows_vd.shape[0] >= 16 * rows else -1


def _logits(hidden_rcd, rows_vd, without_token):
    return vocabulary.masked(_all_logits(hidden_rcd, rows_vd), without_token, _axis(hidden_rcd, rows_vd))


def _all_logits(hidden_rcd, rows_vd):
    dtype = wide(hidden_rcd.dtype)
    if _axis(hidden_rcd, rows_vd) == 0:
        # The barrier keeps XLA from folding the transposition into the matmul, where it costs more than it saves.
        hidden_dn = jax.lax.optimization_barrier(hidden_rcd.reshape(-1, hidden_rcd.shape[-1]).T)
        return jnp.matmul(rows_vd, hidden_dn, preferred_element_type=dtype).reshape(-1, *hidden_rcd.shape[:2])
    out = jax.lax.dot_general(hidden_rcd, rows_vd, (((2,), (1,)), ((), ())), preferred_element_type=dtype)
    return sharding.constrain(out, "rows", None, "vocab")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _stats(chunks, streams, without_token, rows_vd, hidden_rnd, tokens_rn, ref):
    return _stats_fwd(chunks, streams, without_token, rows_vd, hidden_rnd, tokens_rn, ref)[0]


def _stats_of_chunk(without_token, rows_vd, ref_rows_vd, hidden_rcd, tokens_rc, ref_hidden_rcd):
    """((logp, entropy, ref_logp, kl), lse) of a chunk, and its logits."""
    axis = _axis(hidden_rcd, rows_vd)
    logits = _logits(hidden_rcd, rows_vd, without_token)
    top = jnp.max(logits, axis=axis, keepdims=True)
    weight = jnp.exp(logits - top)
    total_rc = jnp.sum(weight, axis=axis)
    lse_rc = jnp.squeeze(top, axis) + jnp.log(total_rc)
    entropy_rc = lse_rc - jnp.sum(weight * logits, axis=axis) / total_rc
    ref_logp_rc = kl_rc = None
    if ref_rows_vd is not None:
        ref = _logits(ref_hidden_rcd, ref_rows_vd, without_token)
        ref_lse_rc = jax.nn.logsumexp(ref, axis=axis)
        ref_logp_rc = _chosen(ref, tokens_rc, axis) - ref_lse_rc
        kl_rc = jnp.sum(weight * (logits - ref), axis=axis) / total_rc - lse_rc + ref_lse_rc
    logp_rc = _chosen(logits, tokens_rc, axis) - lse_rc
    return ((logp_rc, entropy_rc, ref_logp_rc, kl_rc), lse_rc), logits


def _chosen(logits, tokens_rc, axis):
    return jnp.squeeze(jnp.take_along_axis(logits, jnp.expand_dims(tokens_rc, axis), axis=axis), axis)


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


def _stats_fwd(chunks, streams, without_token, rows_vd, hidden_rnd, tokens_rn, ref):
    ref_rows_vd, ref_hidden_rnd = (None, None) if ref is None else ref
    whole_vd, ref_whole_vd = (_gathered(x, hidden_rnd.dtype) for x in (rows_vd, ref_rows_vd))
    stats_of_chunk = functools.partial(_stats_of_chunk, without_token, whole_vd, ref_whole_vd)
    if chunks == 1:
        (out, lse_rn), logits_rnv = stats_of_chunk(hidden_rnd, tokens_rn, ref_hidden_rnd)
    else:
        cut = jax.tree.map(functools.partial(_cut, chunks), (hidden_rnd, tokens_rn, ref_hidden_rnd))
        out, lse_rn = jax.lax.map(lambda xs: stats_of_chunk(*xs)[0], cut)
        out, lse_rn = jax.tree.map(functools.partial(_joined, tokens_rn.shape[1]), (out, lse_rn))
        logits_rnv = None
    return out, (rows_vd, hidden_rnd, tokens_rn, lse_rn, logits_rnv)


def _rows_gradient(d_logits_rcv, hidden_rcd):
    dtype = wide(d_logits_rcv.dtype)
    if on_one_cpu():
        return cpu.kernel_gradient(d_logits_rcv, hidden_rcd, dtype)
    return jnp.einsum("rcv,rcd->vd", d_logits_rcv, hidden_rcd, preferred_element_type=dtype)


def _stats_bwd(chunks, streams, without_token, saved, g):
    rows_vd, hidden_rnd, tokens_rn, lse_rn, logits_rnv = saved
    g_rn = g[0]
    whole_vd = _gathered(rows_vd, hidden_rnd.dtype)

    def gradients_of_chunk(hidden_rcd, tokens_rc, lse_rc, g_rc, logits):
        axis = _axis(hidden_rcd, whole_vd)
        logits = _logits(hidden_rcd, whole_vd, without_token) if logits is None else logits
        word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis % 3)
        tokens, lse, g = (jnp.expand_dims(x, axis) for x in (tokens_rc, lse_rc, g_rc))
        d_logits = (g * ((tokens == word) - jnp.exp(logits - lse))).astype(hidden_rcd.dtype)
        if axis == 0:
            flat_vn, flat_nd = d_logits.reshape(d_logits.shape[0], -1), hidden_rcd.reshape(-1, hidden_rcd.shape[-1])
            d_hidden_dn = jax.lax.dot_general(whole_vd, flat_vn, (((0,), (0,)), ((), ())))
            d_rows_vd = jnp.matmul(flat_vn, flat_nd, preferred_element_type=wide(flat_nd.dtype))
            return d_rows_vd[None], d_hidden_dn.T.reshape(hidden_rcd.shape)
        d_hidden_rcd = jax.lax.dot_general(d_logits, whole_vd, (((2,), (0,)), ((), ())))
        if streams == 1:
            return _rows_gradient(d_logits, hidden_rcd)[None], d_hidden_rcd
        # Each stream's own sum: were they added up here, devices would exchange the whole of it in every chunk.
        d_sxv, hidden_sxd = (x.reshape(streams, -1, x.shape[-1]) for x in (d_logits, hidden_rcd))
        contract = (((1,), (1,)), ((0,), (0,)))
        d_rows_svd = jax.lax.dot_general(d_sxv, hidden_sxd, contract, preferred_element_type=wide(d_logits.dtype))
        return sharding.constrain(d_rows_svd, "rows", "vocab"), d_hidden_rcd

    if chunks == 1:
        d_rows_svd, d_hidden_rnd = gradients_of_chunk(hidden_rnd, tokens_rn, lse_rn, g_rn, logits_rnv)
    else:

        def add(total_svd, xs):
            hidden_rcd, tokens_rc, lse_rc, g_rc = xs
            d_rows_svd, d_hidden_rcd = gradients_of_chunk(hidden_rcd, tokens_rc, lse_rc, g_rc, None)
            return total_svd + d_rows_svd, d_hidden_rcd

        cut = jax.tree.map(functools.partial(_cut, chunks), (hidden_rnd, tokens_rn, lse_rn, g_rn))
        # One CPU would make room for zeros before the forward pass.
        zero = jnp.zeros((), wide(hidden_rnd.dtype))
        zero = cpu.schedule_after(zero, g_rn) if on_one_cpu() else zero
        none_svd = jnp.full((streams, *rows_vd.shape), zero)
        none_svd = sharding.constrain(none_svd, "rows", "vocab")
        d_rows_svd, d_hidden_krcd = jax.lax.scan(add, none_svd, cut)
        d_hidden_rnd = _joined(tokens_rn.shape[1], d_hidden_krcd)
    d_rows_vd = sharding.constrain(jnp.sum(d_rows_svd, axis=0), "vocab", "embed")
    return d_rows_vd.astype(rows_vd.dtype), d_hidden_rnd.astype(hidden_rnd.dtype), None, None


_stats.defvjp(_stats_fwd, _stats_bwd)
