"""The decoder-only transformer of the families in `families.py`, in flax.linen.

Norms, rotary embedding and softmax are in float32, matmuls in `Architecture.compute_dtype`. Masks come from lengths and
slots, never from token values. `ops/` has the operations, `parameters.py` names and shapes every array.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mara_jax.parallel import sharding
from mara_jax.policies import lora, parameters
from mara_jax.policies.kv_cache import KV, init_cache, slot_count, written
from mara_jax.policies.ops import rotary
from mara_jax.policies.ops.attention import Mask, behind_prefix, cache_mask, causal_mask, heads_first, tokens_first
from mara_jax.policies.ops.rms_norm import rms_norm
from mara_jax.policies.ops.select import select
from mara_jax.policies.packing import Packing, pack_only, unpack
from mara_jax.policies.parameters import Architecture, RopeScaling
from mara_jax.policies.remat import SAVED, checkpoint_policy, uses_checkpoints

__all__ = ["KV", "Architecture", "RopeScaling", "forward", "forward_group", "init", "init_cache", "logits"]


class Segment(NamedTuple):
    """Where tokens stand that go through the layers together.

    rope: cosines and sines of their rotary angles; mask: which keys they see; index: the slot of the KV cache where
    they go; packing: where they are packed, [c, n] of b rows.
    """

    rope: tuple[jax.Array, jax.Array]
    mask: Mask
    index: Any = None
    packing: Packing | None = None


class RMSNorm(nn.Module):
    """The root-mean-square norm over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x):
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class Linear(nn.Module):
    """x [..., inputs] by a kernel, plus a bias and the update of a LoRA adapter where there are any: [..., features].

    Of two inputs, gate and up, silu(gate) * up takes the place of x. The kernel is gathered once, however often this is
    called, and its gradient reduced once. axes: the kernel's logical ones.
    """

    arch: Architecture
    inputs: int
    features: int
    axes: tuple[str, str]
    bias: bool = False

    def setup(self):
        kernel = self._array("kernel", self.inputs, self.features)
        # `decoding.lay_out` may put a `cpu.TransposedKernel` in the place of an array.
        self.kernel = sharding.gather_kernel(kernel, self.axes) if isinstance(kernel, jax.Array) else kernel
        self.adapter = [self._array(name) for name in (lora.A, lora.B) if self.has_variable("params", lora.A)]
        self.bias_f = self._array("bias", self.features) if self.bias else None

    def _array(self, name: str, *shape: int):
        array = self.variable("params", name, nn.initializers.zeros, None, shape).value
        return jax.tree.map(lambda leaf: leaf.astype(self.arch.compute_dtype), array)

    def __call__(self, *inputs):
        ops = select(self.arch)
        multiply = functools.partial(ops.matmul if len(inputs) == 1 else ops.swiglu_matmul, *inputs)
        # XLA for GPUs would join the matmuls of several calls, and copy their inputs to do so.
        y = multiply(jax.lax.optimization_barrier(self.kernel))
        if self.adapter:
            y += ops.matmul(multiply(self.adapter[0]), self.adapter[1])
        return y if self.bias_f is None else y + self.bias_f


class Block(nn.Module):
    """One decoder layer: attention and a feed-forward with SwiGLU, each with a norm at its input or at its output.

    hidden: an array [b, t, d] a segment, each of which attends to the KV of the one before as its prefix (completions
    to prompts, which gradients reach so). Returns hidden states, and the KV of a lone segment.
    """

    arch: Architecture

    def setup(self):
        arch, traits = self.arch, self.arch.traits
        d, f, heads, kv_heads = arch.embed, arch.mlp, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        self.attn_norm, self.mlp_norm = RMSNorm(arch.norm_eps), RMSNorm(arch.norm_eps)
        self.q = Linear(arch, d, heads, ("embed", "heads"), traits.qkv_bias)
        self.k = Linear(arch, d, kv_heads, ("embed", "kv_heads"), traits.qkv_bias)
        self.v = Linear(arch, d, kv_heads, ("embed", "kv_heads"), traits.qkv_bias)
        self.o = Linear(arch, heads, d, ("heads", "embed"))
        if traits.qk_norm != "none":
            self.q_norm, self.k_norm = RMSNorm(arch.norm_eps), RMSNorm(arch.norm_eps)
        self.gate, self.up = (Linear(arch, d, f, ("embed", "mlp")) for _ in range(2))
        self.down = Linear(arch, f, d, ("mlp", "embed"))

    def __call__(self, hidden, segments: tuple[Segment, ...], prefix: KV | None, cache: KV | None):
        outputs, kv, norm_outputs = [], None, self.arch.traits.norm_outputs
        for x_btd, segment in zip(hidden, segments, strict=True):  # each norm is at an input or at an output
            y_btd, kv = self.attention(x_btd if norm_outputs else self.attn_norm(x_btd), segment, prefix, cache)
            x_btd = sharding.constrain(x_btd + (self.attn_norm(y_btd) if norm_outputs else y_btd), "rows")
            y_btd = self.mlp(x_btd if norm_outputs else self.mlp_norm(x_btd))
            outputs.append(sharding.constrain(x_btd + (self.mlp_norm(y_btd) if norm_outputs else y_btd), "rows"))
            prefix = kv
        return tuple(outputs), kv if len(segments) == 1 else None

    def attention(self, x_btd, segment: Segment, prefix: KV | None, cache: KV | None):
        """Grouped-query attention over a shared prefix, the KV cache and the tokens themselves: output and KV."""
        ops, qk_norm = select(self.arch), self.arch.traits.qk_norm
        by_head = (*x_btd.shape[:-1], -1, self.arch.head_dim)
        q_btx, k_btx, v_btx = self.q(x_btd), self.k(x_btd), self.v(x_btd)
        if qk_norm == "all_heads":
            q_btx, k_btx = self.q_norm(q_btx), self.k_norm(k_btx)
        q_btnh, k_btkh, v_btkh = (y_btx.reshape(by_head) for y_btx in (q_btx, k_btx, v_btx))
        if qk_norm == "each_head":
            q_btnh, k_btkh = self.q_norm(q_btnh), self.k_norm(k_btkh)
        q_btnh = rotary.rotate(q_btnh, segment.rope) * self.arch.head_dim**-0.5
        k_btkh = rotary.rotate(k_btkh, segment.rope)
        if segment.packing is not None:  # attention alone works on rows
            q_btnh, k_btkh, v_btkh = (unpack(y, segment.packing) for y in (q_btnh, k_btkh, v_btkh))
        q_bkxh, *keys_values = heads_first(q_btnh, k_btkh, v_btkh)
        attend, kv = ops.attention, KV(*keys_values)
        if cache is not None:  # written before it is read: a cache that is read first is copied at every step
            attend, kv = ops.cached_attention, written(cache, kv, segment.index)
        out_bkxh = attend(q_bkxh, (kv.k, kv.v), prefix and (prefix.k, prefix.v), segment.mask)
        out_btx = tokens_first(out_bkxh, q_btnh.shape)
        if segment.packing is not None:
            out_btx = pack_only(out_btx, segment.packing)
        return self.o(checkpoint_name(out_btx, SAVED)), kv

    def mlp(self, x_btd):
        gate_btf, up_btf = (sharding.constrain(y, "rows", None, "mlp") for y in (self.gate(x_btd), self.up(x_btd)))
        return self.down(gate_btf, up_btf)


class Embedding(nn.Module):
    """A table of token embeddings [v, d]; replicated: its channels are whole on every device, as when decoding."""

    arch: Architecture

    @nn.compact
    def __call__(self, tokens_bt, replicated: bool = False):
        arch = self.arch
        table_vd = self.param("embedding", nn.initializers.zeros, (arch.vocab_size, arch.embed))
        if replicated:
            return sharding.constrain(table_vd[tokens_bt].astype(arch.compute_dtype), "rows")
        return sharding.embedding_lookup(table_vd, tokens_bt, arch.compute_dtype)


class Decoder(nn.Module):
    """Embedding, layers (scanned or unrolled) and the final norm: hidden states of each segment, and KV if it is one.

    The initialisers named in these modules are never used: `init` draws parameters from the parameter table.
    """

    arch: Architecture

    @nn.compact
    def __call__(self, tokens, segments: tuple[Segment, ...], prefix: KV | None = None, cache: KV | None = None):
        arch, block = self.arch, Block
        embed, final_norm = Embedding(arch, name="embed"), RMSNorm(arch.norm_eps, name="final_norm")
        hidden = tuple(embed(tokens_bt, cache is not None) for tokens_bt in tokens)
        if uses_checkpoints(arch):
            block = nn.remat(Block, policy=checkpoint_policy(arch), prevent_cse=not arch.scan_layers)
        if arch.scan_layers:
            options: Any = {"variable_axes": {"params": 0}, "in_axes": (nn.broadcast, 0, 0), "length": arch.layers}
            scanned = nn.scan(block, split_rngs={"params": False}, **options)
            hidden, kv = scanned(arch, name="layers")(hidden, segments, prefix, cache)
        else:
            kvs = []
            for i in range(arch.layers):
                at_layer = [kv and KV(kv.k[i], kv.v[i]) for kv in (prefix, cache)]
                hidden, kv = block(arch, name=f"layers_{i}")(hidden, segments, *at_layer)
                kvs.append(kv)
            kv = None if None in kvs else KV(tuple(kv.k for kv in kvs), tuple(kv.v for kv in kvs))
        return tuple(final_norm(x_btd) for x_btd in hidden), kv


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
        from `init_cache`, of b rows; index: the slot where these tokens go, the same for all rows; counts_b: with it
        the cache is a ring buffer, of which a row of one token sees so many slots, the last of them `index`.
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
    mask = Mask(causal_mask(t, group) if cache is None else cache_mask(t, group, slot_count(cache), index, counts_b))
    if prefix is not None and prefix_lengths_p is not None:
        mask = behind_prefix(mask, slot_count(prefix), prefix_lengths_p)
    segment = Segment(_rope(arch, positions_bt), mask, index)
    decoder: Any = Decoder(arch)  # what apply returns depends on flags that type checkers cannot follow
    (hidden_btd,), kv = decoder.apply({"params": params}, (tokens_bt,), (segment,), prefix, cache)
    return hidden_btd, kv


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
    decoder: Any = Decoder(arch)
    tokens = (prompt_tokens_ps, tokens_bt)
    return decoder.apply({"params": params}, tokens, (prompts, completions))[0]


def logits(arch: Architecture, params: Any, hidden: jax.Array) -> jax.Array:
    """Next-token logits of hidden states [..., d]: float32 [..., v]."""
    rows_vd = head_rows(arch, params).astype(hidden.dtype)
    contract = (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(hidden, rows_vd, contract, preferred_element_type=parameters.wide(hidden.dtype))


def head_rows(arch: Architecture, params: Any) -> jax.Array:
    """The LM head's matrix [v, d]."""
    return params["embed" if arch.tie_embeddings else "head"]["embedding"]


def init(arch: Architecture, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters for an architecture (see `parameters.init`)."""
    return parameters.init(arch, key)
