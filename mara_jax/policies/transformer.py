"""The decoder-only transformer of the Qwen2, Qwen3 and Llama families: pure functions of a nested dict of parameters.

Norms, rotary embedding and softmax are in float32, matmuls in `Architecture.compute_dtype`. Masks come from lengths and
slots, never from token values. `ops/` has the operations, `parameters.py` names and shapes every array.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mara_jax.parallel import sharding
from mara_jax.policies import lora, parameters
from mara_jax.policies.ops import rotary
from mara_jax.policies.ops.attention import SAVED, Mask, behind_prefix, cache_mask, causal_mask
from mara_jax.policies.ops.rms_norm import rms_norm
from mara_jax.policies.ops.select import Operations, select
from mara_jax.policies.packing import Packing, pack_only, unpack
from mara_jax.policies.parameters import Architecture, RopeScaling
from mara_jax.policies.remat import checkpointed

__all__ = ["KV", "Architecture", "RopeScaling", "forward", "forward_group", "init", "init_cache", "logits"]


@flax.struct.dataclass
class KV:
    """Keys and values of every layer: a tuple of [rows, k, s, h] when unrolled, one [l, rows, k, s, h] when scanned.

    Heads come before time so that attention's batched matmuls read them as they lie.
    """

    k: Any
    v: Any


class Segment(NamedTuple):
    """Where tokens stand that go through the layers together.

    rope: cosines and sines of their rotary angles; mask: which keys they see; index: the slot of the KV cache where
    they go; packing: where they are packed, [c, n] of b rows.
    """

    rope: tuple[jax.Array, jax.Array]
    mask: Mask
    index: Any = None
    packing: Packing | None = None


def linear(ops: Operations, params: dict[str, Any], x: jax.Array) -> jax.Array:
    """x [..., d] by a kernel, plus a bias and the update of a LoRA adapter where there are any: [..., f]."""
    return _with_bias_and_adapter(ops, params, functools.partial(ops.matmul, x))


def swiglu_linear(ops: Operations, params: dict[str, Any], gate: jax.Array, up: jax.Array) -> jax.Array:
    """`linear` of silu(gate) * up."""
    return _with_bias_and_adapter(ops, params, functools.partial(ops.swiglu_matmul, gate, up))


def _with_bias_and_adapter(ops, params, multiply):
    y = multiply(params["kernel"])
    if lora.A in params:
        y += ops.matmul(multiply(params[lora.A]), params[lora.B])
    return y + params["bias"] if "bias" in params else y


def attention(ops: Operations, arch: Architecture, params, x_btd, segment: Segment, prefix, cache):
    """Grouped-query attention over a shared prefix, the KV cache and the tokens themselves: its output, and the KV."""
    by_head = lambda name: linear(ops, params[name], x_btd).reshape(*x_btd.shape[:-1], -1, arch.head_dim)  # noqa: E731
    q_btnh, k_btkh, v_btkh = by_head("q"), by_head("k"), by_head("v")
    if arch.qk_norm:
        q_btnh = rms_norm(q_btnh, params["q_norm"]["scale"], arch.norm_eps)
        k_btkh = rms_norm(k_btkh, params["k_norm"]["scale"], arch.norm_eps)
    q_btnh = rotary.rotate(q_btnh, segment.rope) * arch.head_dim**-0.5
    k_btkh = rotary.rotate(k_btkh, segment.rope)
    if segment.packing is not None:  # attention alone works on rows
        q_btnh, k_btkh, v_btkh = (unpack(y, segment.packing) for y in (q_btnh, k_btkh, v_btkh))
    q_bkxh, k_bkth, v_bkth = _heads_first(q_btnh, k_btkh, v_btkh)
    kv, attend = KV(k_bkth, v_bkth), ops.attention
    if cache is not None:  # written before it is read: a cache that is read first is copied at every step
        kv = KV(_write(cache.k, k_bkth, segment.index), _write(cache.v, v_bkth, segment.index))
        attend = ops.cached_attention
    out_bkxh = attend(q_bkxh, (kv.k, kv.v), prefix and (prefix.k, prefix.v), segment.mask)
    out_btx = _tokens_first(out_bkxh, q_btnh.shape)
    if segment.packing is not None:
        out_btx = pack_only(out_btx, segment.packing)
    return linear(ops, params["o"], checkpoint_name(out_btx, SAVED)), kv


def _heads_first(q_btnh, k_btkh, v_btkh):
    """Queries [b, k, x, h], keys and values [b, k, t, h]; x: (query head of a kv head, time)."""
    (b, t, n, h), k = q_btnh.shape, k_btkh.shape[2]
    # Where kv heads stay whole, the query heads of each are sharded instead.
    whole = sharding.shard_count("kv_heads") == 1 and n // k % sharding.shard_count("heads") == 0
    axes = ("rows", None, "heads") if whole else ("rows", "kv_heads")
    q_bkxh = sharding.constrain(q_btnh.transpose(0, 2, 1, 3).reshape(b, k, n // k * t, h), *axes)
    return q_bkxh, *(sharding.constrain(y.transpose(0, 2, 1, 3), "rows", "kv_heads") for y in (k_btkh, v_btkh))


def _tokens_first(out_bkxh, shape_btnh):
    """[b, t, n h]: a token's heads together."""
    b, t, n, h = shape_btnh
    return out_bkxh.reshape(b, n, t, h).swapaxes(1, 2).reshape(b, t, n * h)


def _write(cache, new, index):
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), index, axis=2)


def mlp(ops: Operations, params, x_btd):
    """The feed-forward with SwiGLU."""
    gate_btf, up_btf = (linear(ops, params[name], x_btd) for name in ("gate", "up"))
    gate_btf, up_btf = (sharding.constrain(y_btf, "rows", None, "mlp") for y_btf in (gate_btf, up_btf))
    return swiglu_linear(ops, params["down"], gate_btf, up_btf)


def block(arch: Architecture, params, hidden, segments: tuple[Segment, ...], prefix: KV | None, cache: KV | None):
    """One decoder layer: attention and feed-forward, each on the normed residual stream.

    Several segments take turns, each with the KV of the one before as its prefix: so a kernel that is sharded over
    devices is gathered once for all, and its gradient reduced once.
    """
    ops, outputs, kv = select(arch), [], None
    params = parameters.gathered(arch, params)
    for number, (x_btd, segment) in enumerate(zip(hidden, segments, strict=True)):
        # XLA for GPUs would join the segments' matmuls by a kernel, and copy both of their inputs to do so.
        own = jax.tree.map(jax.lax.optimization_barrier, params) if number + 1 < len(segments) else params
        normed_btd = rms_norm(x_btd, own["attn_norm"]["scale"], arch.norm_eps)
        mixed_btd, kv = attention(ops, arch, own, normed_btd, segment, prefix, cache)
        x_btd = sharding.constrain(x_btd + mixed_btd, "rows")
        normed_btd = rms_norm(x_btd, own["mlp_norm"]["scale"], arch.norm_eps)
        outputs.append(sharding.constrain(x_btd + mlp(ops, own, normed_btd), "rows"))
        prefix = kv
    return tuple(outputs), kv


def embed(arch: Architecture, params, tokens_bt, replicated: bool = False):
    """Token embeddings [b, t, d]; replicated: the table's channels are whole on every device, as when decoding."""
    table_vd = params["embed"]["embedding"]
    if replicated:
        return sharding.constrain(table_vd[tokens_bt].astype(arch.compute_dtype), "rows")
    return sharding.embedding_lookup(table_vd, tokens_bt, arch.compute_dtype)


def decoder(arch: Architecture, params, tokens, segments: tuple[Segment, ...], prefix=None, cache=None):
    """Hidden states after the final norm, one array for each segment, and the KV of the last one."""
    hidden = tuple(embed(arch, params, tokens_bt, cache is not None) for tokens_bt in tokens)
    layer = checkpointed(arch, functools.partial(block, arch))
    if arch.scan_layers:

        def step(hidden, layer_inputs):
            layer_params, layer_prefix, layer_cache = layer_inputs
            hidden, kv = layer(layer_params, hidden, segments, layer_prefix, layer_cache)
            return hidden, kv if len(segments) == 1 else None

        hidden, kv = jax.lax.scan(step, hidden, (params["layers"], prefix, cache))
    else:
        kvs = []
        for i in range(arch.layers):
            at_layer = [kv and KV(kv.k[i], kv.v[i]) for kv in (prefix, cache)]
            hidden, kv = layer(params[f"layers_{i}"], hidden, segments, *at_layer)
            kvs.append(kv)
        kv = KV(tuple(kv.k for kv in kvs), tuple(kv.v for kv in kvs))
    return tuple(rms_norm(x_btd, params["final_norm"]["scale"], arch.norm_eps) for x_btd in hidden), kv


def forward(
    arch: Architecture,
    params: Any,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    *,
    prefix: KV | None = None,
    prefix_lengths_p: jax.Array | None = None,
    cache: KV | None = None,
    index: jax.Array | int | None = None,
    counts_b: jax.Array | None = None,
) -> tuple[jax.Array, KV]:
    """Hidden states of tokens that follow a shared prefix and a KV cache, either, or neither.

    A query sees its prompt's prefix up to that prompt's length, the cache slots below `index`, and the given tokens up
    to itself. Rows are (prompt, sample), row-major: row r belongs to prompt r // (b / p). The prefix is read where it
    lies, never repeated per sample, and gradients flow into it.

    args: arch: static; params: nested dict; tokens_bt: ids; positions_bt: rotary positions, counted from the start of
        the prompt; prefix: what a forward over the p prompts returned; prefix_lengths_p: tokens of each prompt; cache:
        from `init_cache`, of b rows; index: the slot where these tokens go, the same for all rows; counts_b: where
        given the cache is a ring, and of its slots a row sees that many, the last of them `index`, where its one token
        goes.
    returns: hidden states after the final norm, [b, t, d] in the compute dtype, and keys and values: the cache with
        these tokens written from slot `index` on, or without a cache theirs alone.
    errors: ValueError where a prefix comes without lengths, a cache without an index, or b is no multiple of p.
    """
    if (prefix is None) != (prefix_lengths_p is None):
        raise ValueError("prefix and prefix_lengths_p go together: give both or neither")
    if (cache is None) != (index is None):
        raise ValueError("cache and index go together: give both or neither")
    b, t = tokens_bt.shape
    if prefix_lengths_p is not None and b % prefix_lengths_p.shape[0]:
        raise ValueError(f"{b} rows do not divide over {prefix_lengths_p.shape[0]} prompts")
    group = arch.heads // arch.kv_heads
    mask = Mask(causal_mask(t, group) if cache is None else cache_mask(t, group, _slots(cache), index, counts_b))
    if prefix is not None:
        mask = behind_prefix(mask, _slots(prefix), prefix_lengths_p)
    segment = Segment(_rope(arch, positions_bt), mask, index)
    (hidden_btd,), kv = decoder(arch, params, (tokens_bt,), (segment,), prefix, cache)
    return hidden_btd, kv


def _slots(kv: KV) -> int:
    return jax.tree.leaves(kv.k)[0].shape[-2]


def _rope(arch, positions_bt):
    return jax.tree.map(select(arch).stored, rotary.angles(arch, positions_bt))


def forward_group(
    arch: Architecture,
    params: Any,
    prompt_tokens_ps: jax.Array,
    prompt_lengths_p: jax.Array,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    packing: Packing | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states of prompts and of the completions that follow them, as two calls of `forward` give them.

    args: as `forward`; packing: where tokens_bt and positions_bt are packed, [c, n] of b rows.
    returns: hidden states [p, s, d], and [b, t, d] or [c, n, d].
    """
    (p, s), t = prompt_tokens_ps.shape, tokens_bt.shape[1] if packing is None else packing.slot_bt.shape[1]
    group = arch.heads // arch.kv_heads
    prompts = Segment(_rope(arch, jnp.broadcast_to(jnp.arange(s), (p, s))), Mask(causal_mask(s, group)))
    lengths_b = None if packing is None else jnp.sum(packing.slot_bt >= 0, axis=1, dtype=jnp.int32)
    mask = behind_prefix(Mask(causal_mask(t, group), lengths_b=lengths_b), s, prompt_lengths_p)
    completions = Segment(_rope(arch, positions_bt), mask, packing=packing)
    (prompts_psd, rest), _ = decoder(arch, params, (prompt_tokens_ps, tokens_bt), (prompts, completions))
    return prompts_psd, rest


def logits(arch: Architecture, params: Any, hidden: jax.Array) -> jax.Array:
    """Next-token logits of hidden states [..., d]: float32 [..., v]."""
    rows_vd = head_rows(arch, params).astype(hidden.dtype)
    contract = (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(hidden, rows_vd, contract, preferred_element_type=parameters.wide(hidden.dtype))


def head_rows(arch: Architecture, params: Any) -> jax.Array:
    """The LM head's matrix [v, d]."""
    return params["embed" if arch.tie_embeddings else "head"]["embedding"]


def init_cache(arch: Architecture, rows: int, length: int) -> KV:
    """An empty KV cache: zeros in the compute dtype, with `length` slots for each of `rows` sequences."""

    def zeros():
        shape = (rows, arch.kv_heads, length, arch.head_dim)
        if arch.scan_layers:
            return sharding.constrain(jnp.zeros((arch.layers, *shape), arch.compute_dtype), None, "rows", "kv_heads")
        each = (jnp.zeros(shape, arch.compute_dtype) for _ in range(arch.layers))
        return tuple(sharding.constrain(array, "rows", "kv_heads") for array in each)

    return KV(zeros(), zeros())


def init(arch: Architecture, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters for an architecture (see `parameters.init`)."""
    return parameters.init(arch, key)
