"""Log-probs of given completions: prompts computed once per group, padding not at all."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.policies import transformer
from mara_jax.policies.packing import Packing, bucket_size, pack, pack_lengths, unpack
from mara_jax.sampling import head, rollout


class Hidden(NamedTuple):
    """The hidden states that predict completions of p prompts, g each.

    last_pd: of each prompt's last token, which predicts the first token of its whole group.
    rest: of the completions' own tokens but the last: padded [b, t - 1, d], or packed in streams [c, n, d].
    """

    last_pd: jax.Array
    rest: jax.Array


def packed(lengths_pg: np.ndarray, width: int, buckets: int, *, shards: int = 1, parts: int = 1) -> Packing | None:
    """How the tokens that a forward pass reads, all but each completion's last, lie in streams; None: padded.

    Args:
      lengths_pg: tokens of each completion, on the host.
      width: of the padded completions.
      buckets: a stream's size is one of so many fractions of the padded one; 0 leaves completions padded.
      shards: streams, one a device shard of rows.
      parts: where more than one, the packings of the groups' parts (see `split`) on a new leading axis.
    """
    if not buckets or width == 1:
        return None
    read_kb = split(lengths_pg, parts).reshape(parts, -1) - 1
    slots = max(bucket_size(read_b, width - 1, buckets, streams=shards) for read_b in read_kb)
    packings = [pack_lengths(read_b, width - 1, streams=shards, slots=slots) for read_b in read_kb]
    return packings[0] if parts == 1 else Packing(*(np.stack(arrays) for arrays in zip(*packings, strict=True)))


def split(x_pg: Any, parts: int) -> Any:
    """[p, g, ...] as [parts, p, g / parts, ...]: each part has some samples of every group."""
    p, g = x_pg.shape[:2]
    return x_pg.reshape(p, parts, g // parts, *x_pg.shape[2:]).swapaxes(0, 1)


def joined(x_kpg: Any) -> Any:
    """The inverse of `split`."""
    k, p, g = x_kpg.shape[:3]
    return x_kpg.swapaxes(0, 1).reshape(p, k * g, *x_kpg.shape[3:])


def completion_hidden(
    arch: transformer.Architecture,
    params: Any,
    prompt_tokens_ps: jax.Array,
    prompt_lengths_p: jax.Array,
    tokens_pgt: jax.Array,
    packing: Packing | None = None,
) -> Hidden:
    """The hidden states from which completion tokens are predicted.

    Each prompt is computed once; differentiable in params, also through its keys and values.

    Args:
      packing: from `packed`; without it every padded position is computed.
    """
    p, g, t = tokens_pgt.shape
    if t == 1:
        last_pd, _ = rollout.prefill(arch, params, prompt_tokens_ps, prompt_lengths_p)
        return Hidden(last_pd, jnp.zeros((p * g, 0, last_pd.shape[-1]), last_pd.dtype))
    tokens_bt = tokens_pgt.reshape(p * g, t)[:, :-1]
    positions_bt = jnp.repeat(prompt_lengths_p, g)[:, None] + jnp.arange(t - 1)
    if packing is not None:
        tokens_bt, positions_bt = (pack(x, packing) for x in (tokens_bt, positions_bt))
    hidden_psd, rest = transformer.forward_group(
        arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_bt, positions_bt, packing
    )
    return Hidden(rollout.last(hidden_psd, prompt_lengths_p), rest)


def token_stats(
    arch: transformer.Architecture,
    params: Any,
    hidden: Hidden,
    tokens_pgt: jax.Array,
    packing: Packing | None = None,
    *,
    ref_params: Any = None,
    ref_hidden: Hidden | None = None,
) -> head.Stats:
    """The head's statistics of every completion token, each [p, g, t] float32 (nats): see `head.token_stats`.

    Values at padding are finite and mean nothing: mask them by the lengths.
    """
    p, g, t = tokens_pgt.shape
    rows = 1 if packing is None else p * g // packing.place_cn.shape[0]  # of each stream

    def joined(first_b, rest):
        """First tokens' values ahead of the others', stream by stream."""
        return jnp.concatenate([first_b.reshape(-1, rows, *rest.shape[2:]), rest], axis=1)

    def hidden_of(hidden: Hidden):
        return joined(jnp.repeat(hidden.last_pd, g, axis=0), hidden.rest)

    def rows_of(x_cn):
        first_b1, rest = x_cn[:, :rows].reshape(p * g, 1), x_cn[:, rows:]
        rest_bt = rest if packing is None else unpack(rest, packing)
        return jnp.concatenate([first_b1, rest_bt], axis=1).reshape(p, g, t)

    tokens_bt = tokens_pgt.reshape(p * g, t)
    rest = tokens_bt[:, 1:] if packing is None else pack(tokens_bt[:, 1:], packing)
    stats = head.token_stats(
        arch,
        params,
        hidden_of(hidden),
        joined(tokens_bt[:, 0], rest),
        ref_params=ref_params,
        ref_hidden_rnd=None if ref_hidden is None else hidden_of(ref_hidden),
        streams=1 if packing is None else packing.place_cn.shape[0],
    )
    return jax.tree.map(rows_of, stats)


def completion_logps(
    arch: transformer.Architecture,
    params: Any,
    prompt_tokens_ps: jax.Array,
    prompt_lengths_p: jax.Array,
    tokens_pgt: jax.Array,
    packing: Packing | None = None,
) -> jax.Array:
    """log pi(token | prompt, earlier tokens) of every completion token, [p, g, t] float32 (nats).

    Values at padding are finite and mean nothing: mask them by the lengths.
    """
    hidden = completion_hidden(arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt, packing)
    return token_stats(arch, params, hidden, tokens_pgt, packing).logp


def mask(lengths_pg: jax.Array, width: int) -> jax.Array:
    """1 at the first `lengths` positions, else 0: [p, g, width] float32."""
    return (jnp.arange(width) < lengths_pg[..., None]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("arch", "parts"))
def reference_hidden(
    arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt, packing: Packing | None = None, parts: int = 1
) -> Hidden:
    """`completion_hidden`; where there are several parts, of each in turn, on a new leading axis."""
    hidden_of = functools.partial(completion_hidden, arch, params, prompt_tokens_ps, prompt_lengths_p)
    if parts == 1:
        return hidden_of(tokens_pgt, packing)
    return jax.lax.map(lambda part: hidden_of(*part), (split(tokens_pgt, parts), packing))
