"""The decoder-only transformer of the Qwen2, Qwen3 and Llama families, in flax.linen.

Attention runs over a prefix of keys that a prompt's samples share and over the rows' own ones, which are never
joined in memory: only the scores are concatenated, and one softmax spans them.
Norms, rotary embedding and softmax are in float32; matmuls in `Architecture.compute_dtype`.
Masks come from lengths and slots, never from token values.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.parallel import sharding
from mara_jax.policies import attention, flash, gating, lora, norms, parameters, products, rotary
from mara_jax.policies import packing as streams
from mara_jax.policies.packing import Packing
from mara_jax.policies.parameters import Architecture, RopeScaling
from mara_jax.policies.products import Remade

__all__ = ["KV", "Architecture", "RopeScaling", "forward", "init", "init_cache", "logits"]

TURNED = "kernel_oi"  # the name of a kernel that is stored as [out, in]


@flax.struct.dataclass
class KV:
    """Keys and values of every layer: a tuple of [rows, k, s, h] when unrolled, one [l, rows, k, s, h] when
    scanned.

    Heads come before time so that attention's batched matmuls read them as they lie.
    """

    k: Any
    v: Any


class Norm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (or wider); settled: see `norms.remade`."""

    eps: float
    settled: bool = False

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return norms.remade(x, scale, self.eps, self.settled)


class Linear(nn.Module):
    """A matmul by a kernel [in, out], or one laid out by `decoding.lay_out`, with an optional bias, in x's dtype.

    It returns the matmul, a function of x [..., in]; where that is given `up`, silu(x) * up takes the place of x.
    However often it is called, devices that share the kernel gather it once.
    With an adapter attached the kernel is not touched: its update is two thin matmuls, and so are their gradients.
    frozen: nobody asks for the kernel's gradient.
    """

    features: int
    axes: tuple[str, str]  # of the kernel, logical
    bias: bool = False

    @nn.compact
    def __call__(self, inputs: int, dtype: Any):
        zeros, turned = nn.initializers.zeros, self.has_variable("params", TURNED)
        if turned:
            kernel = self.get_variable("params", TURNED)
        else:
            kernel = self.param("kernel", zeros, (inputs, self.features)).astype(dtype)
            kernel = sharding.gather_kernel(kernel, self.axes)
        names = (lora.A, lora.B) if self.has_variable("params", lora.A) else ()
        adapter = [self.get_variable("params", name).astype(dtype) for name in names]
        bias = self.param("bias", zeros, (self.features,)).astype(dtype) if self.bias else None

        def matmul(x, up=None, apart: bool = False, frozen: bool = False):
            # XLA for GPUs makes one matmul of two by the same kernel, and copies both x to do so.
            whole: Any = jax.lax.optimization_barrier(kernel) if apart else kernel

            def by(matrix, frozen: bool = False):
                return products.matmul(x, matrix) if up is None else gating.matmul(x, up, matrix, frozen)

            def plain():
                return x.array if isinstance(x, Remade) else x if up is None else nn.silu(x) * up

            out: Any = products.few_rows(whole, plain()) if turned else by(whole, frozen)
            if adapter:
                out += products.matmul(by(adapter[0]), adapter[1])
            return out if bias is None else out + bias

        return matmul


class Layer(nn.Module):
    """One decoder layer: attention and a gated feed-forward, each on the normed residual stream.

    Where masks are a pair, of prompts and of what follows them, the first are the second's prefix. On one device x is
    [1, n, d], the prompts' rows one after the other and then the rest, and only attention tells them apart. On several
    x and rope are pairs, too: their rows lie on different devices.
    """

    arch: Architecture

    @nn.compact
    def __call__(self, x, rope, masks, prefix, cache, packing):
        arch, parts = self.arch, {}
        heads, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        dtype = jax.tree.leaves(x)[0].dtype
        for name, width, axis in (("q", heads, "heads"), ("k", keys, "kv_heads"), ("v", keys, "kv_heads")):
            parts[name] = Linear(width, ("embed", axis), arch.qkv_bias, name=name)(arch.embed, dtype)
        for name, width, axis in (("o", heads, "heads"), ("down", arch.mlp, "mlp")):
            parts[name] = Linear(arch.embed, (axis, "embed"), name=name)(width, dtype)
        for name in ("gate", "up"):
            parts[name] = Linear(arch.mlp, ("embed", "mlp"), name=name)(arch.embed, dtype)
        for name in ("attn_norm", "mlp_norm", *(("q_norm", "k_norm") if arch.qk_norm else ())):
            parts[name] = Norm(arch.norm_eps, name=name)
        if not isinstance(masks, tuple):
            return self._pass(parts, x, rope, masks, prefix, cache, packing)
        if not isinstance(x, tuple):
            return self._pass(parts, x[0], [y[0] for y in rope], masks, None, None, packing)[0][None], None
        apart = parts | {name: partial(parts[name], apart=True) for name in parameters.KERNELS}
        prompts, prefix = self._pass(apart, x[0], rope[0], masks[0], None, None, None)
        rest, _ = self._pass(parts, x[1], rope[1], masks[1], prefix, None, packing)
        return (prompts, rest), None

    def _pass(self, parts, x_btd, rope, masks, prefix, cache, packing):
        mixed, kv = self._attention(parts, parts["attn_norm"](x_btd), rope, masks, prefix, cache, packing)
        x_btd = sharding.constrain(x_btd + mixed, "rows")
        y_btd = parts["mlp_norm"](x_btd)
        gate_btf, up_btf = (sharding.constrain(parts[name](y_btd), "rows", None, "mlp") for name in ("gate", "up"))
        down_btd = parts["down"](gate_btf, up_btf, frozen=self.arch.lora is not None)
        return sharding.constrain(x_btd + down_btd, "rows"), kv

    def _attention(self, parts, x_btd: Remade, rope, masks, prefix, cache, packing):
        arch = self.arch
        of = [
            parts[name](x_btd).reshape(*x_btd.array.shape[:-1], heads, arch.head_dim)
            for name, heads in (("q", arch.heads), ("k", arch.kv_heads), ("v", arch.kv_heads))
        ]
        if isinstance(masks, tuple):
            return parts["o"](self._attend_group(parts, of, rope, masks, packing)), None
        out, own = self._attend(self._ready(parts, of, rope, packing), masks, prefix, cache, packing)
        return parts["o"](out), own

    def _ready(self, parts, of, rope, packing):
        """Queries, keys and values as attention takes them, [b, k, x, h] and twice [b, k, t, h], of their products by
        kernels."""
        q_btnh, k_btkh, v_btkh = of
        if self.arch.qk_norm:
            q_btnh, k_btkh = parts["q_norm"](q_btnh).array, parts["k_norm"](k_btkh).array
        q_btnh, k_btkh = rotary.rotate(q_btnh, rope) * self.arch.head_dim**-0.5, rotary.rotate(k_btkh, rope)
        if packing is not None:  # attention alone works on rows
            q_btnh, k_btkh, v_btkh = (streams.unpack(x, packing) for x in (q_btnh, k_btkh, v_btkh))
        b, t, n, h = q_btnh.shape
        k, m = k_btkh.shape[2], n // k_btkh.shape[2]
        # Where kv heads stay whole, the query heads of each are cut instead.
        whole = sharding.shard_count("kv_heads") == 1 and m % sharding.shard_count("heads") == 0
        axes = ("rows", None, "heads") if whole else ("rows", "kv_heads")
        q_bkxh = sharding.constrain(q_btnh.transpose(0, 2, 1, 3).reshape(b, k, m * t, h), *axes)
        return q_bkxh, *(sharding.constrain(x.transpose(0, 2, 1, 3), "rows", "kv_heads") for x in (k_btkh, v_btkh))

    def _attend(self, ready, masks, prefix, cache, packing) -> tuple[jax.Array, KV]:
        q_bkxh, k_bkth, v_bkth = ready
        own, arch, t = KV(k_bkth, v_bkth), self.arch, k_bkth.shape[2]
        if cache is not None:
            # Written before it is read: a cache that is read first has to be copied at every step.
            own = KV(*(_write(*both, masks["index"]) for both in ((cache.k, own.k), (cache.v, own.v))))
        if cache is None and attention.by_kernels(arch):
            shared = None if prefix is None else (prefix.k, prefix.v, masks["prefix_lengths"])
            interpret = sharding.platform() == "cpu"
            out_bkxh = flash.attend(q_bkxh, (own.k, own.v), masks["counts"], shared, interpret=interpret)
            return attention.laid_out(out_bkxh, t, packing), own
        shared = None if prefix is None else (prefix.k, prefix.v, masks["prefix"])
        return attention.attend(q_bkxh, (own.k, own.v, masks["own"]), shared, t=t, packing=packing), own

    def _attend_group(self, parts, of, rope, masks, packing):
        """Attention of prompts and what follows them, [n, heads h], of their products by kernels, [n, heads, h]."""
        p, s = masks[1]["prefix"].shape
        lead = (-1, masks[1]["own"].shape[1]) if packing is None else packing.place_cn.shape

        # Cut before they are turned: XLA would keep what is turned whole as well as cut.
        flat, tree = jax.tree.flatten((of, rope))
        cuts = zip(*(jnp.split(x, [p * s]) for x in flat), strict=True)

        def ready(cut: Any, lead: tuple[int, ...], packing: Packing | None):
            cut_of, cut_rope = tree.unflatten([x.reshape(*lead, *x.shape[1:]) for x in cut])
            return self._ready(parts, cut_of, cut_rope, packing)

        of_prompts, of_rest = cuts
        prompts, rest = ready(of_prompts, (p, s), None), ready(of_rest, lead, packing)
        if attention.by_kernels(self.arch):
            prompts_out, prefix = self._attend(prompts, masks[0], None, None, None)
            both = prompts_out, self._attend(rest, masks[1], prefix, None, packing)[0]
            return jnp.concatenate([out.reshape(-1, out.shape[-1]) for out in both])
        own, seen = masks[1]["own"], masks[1]["prefix"]
        return attention.attend_group((*prompts, masks[0]["own"]), (*rest, own, seen), packing=packing)


def _write(cache, new, index):
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), index, axis=2)


class Embedding(nn.Module):
    """A table of token embeddings [v, d]; whole: its channels lie together on every device, as `decoding.lay_out`
    puts them."""

    arch: Architecture

    @nn.compact
    def __call__(self, tokens_bt, whole: bool = False):
        arch = self.arch
        table_vd = self.param("embedding", nn.initializers.zeros, (arch.vocab_size, arch.embed))
        if whole:
            return sharding.constrain(table_vd[tokens_bt].astype(arch.compute_dtype), "rows")
        return sharding.embedding_lookup(table_vd, tokens_bt, arch.compute_dtype)


def _kernels_output(arch: Architecture, prim: Any, *avals: Any, **params: Any) -> bool:
    """Whether remat "elementwise" keeps a result: a kernel's, and of an adapter the thin one between its factors."""
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *avals, **params):
        return False
    (contracted, _), _ = params["dimension_numbers"]
    return arch.lora is None or avals[0].shape[contracted[0]] != arch.lora.rank


def _but_gathered(prim: Any, *_: Any, **__: Any) -> bool:
    """All is kept but what gathers kernels: kept, those of all layers would be whole on every device."""
    return prim.name not in ("sharding_constraint", "optimization_barrier", "convert_element_type")


class Decoder(nn.Module):
    """Embedding, layers (scanned or unrolled) and final norm; returns hidden states and the new keys and
    values. Of pairs, as a `Layer` takes them, a pair of hidden states.

    The initialisers named in these modules are never used: `init` draws parameters from the parameter table.
    """

    arch: Architecture

    @nn.compact
    def __call__(self, tokens, positions, masks, prefix=None, cache=None, packing=None):
        arch = self.arch
        embed = Embedding(arch, name="embed")
        x = jax.tree.map(lambda ids_bt: embed(ids_bt, cache is not None), tokens)
        rope = jax.tree.map(partial(rotary.angles, arch), positions)
        block: Any = Layer
        if arch.remat == "none" and sharding.shard_count("embed") > 1:
            block = nn.remat(Layer, prevent_cse=not arch.scan_layers, policy=_but_gathered)
        elif arch.remat != "none":
            keep = partial(_kernels_output, arch) if arch.remat == "elementwise" else None
            block = nn.remat(Layer, prevent_cse=not arch.scan_layers, policy=keep)
        if arch.scan_layers:
            axes: Any = (nn.broadcast, nn.broadcast, 0, 0, nn.broadcast)
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": False},
                in_axes=axes,
                length=arch.layers,
            )
            x, new = scanned(arch, name="layers")(x, rope, masks, prefix, cache, packing)
        else:
            ks, vs = [], []
            for i in range(arch.layers):
                at_layer = [None if kv is None else KV(kv.k[i], kv.v[i]) for kv in (prefix, cache)]
                x, kv = block(arch, name=f"layers_{i}")(x, rope, masks, *at_layer, packing)
                ks.append(kv and kv.k)
                vs.append(kv and kv.v)
            new = KV(tuple(ks), tuple(vs))
        norm = Norm(arch.norm_eps, settled=True, name="final_norm")
        return jax.tree.map(lambda x_btd: norm(x_btd).array, x), new


def masks(
    arch: Architecture,
    t: int,
    prefix: KV | None = None,
    prefix_lengths_p: Any = None,
    cache: KV | None = None,
    index: Any = None,
    counts_b: Any = None,
    packing: Packing | None = None,
) -> dict[str, Any]:
    """Which keys a query sees: prefix slots below its length, own ones (those of the cache too) up to itself; of a
    cache that is a ring, as many up to the newest as its row counts."""
    at_t = np.arange(t) if cache is None else index + jnp.arange(t)
    slots = np.arange(t) if cache is None else jnp.arange(jax.tree.leaves(cache.v)[0].shape[-2])
    found = {"own": jnp.tile(slots <= at_t[:, None], (arch.heads // arch.kv_heads, 1)), "index": index}
    found["counts"] = None if packing is None else jnp.sum(packing.slot_bt >= 0, axis=1, dtype=jnp.int32)
    if counts_b is not None:
        found["own"] = ((index - slots) % slots.size < counts_b[:, None])[:, None, None, :]
    if prefix is not None:
        slots = jnp.arange(jax.tree.leaves(prefix.k)[0].shape[-2])
        found["prefix"] = slots[None, :] < prefix_lengths_p[:, None]
        found["prefix_lengths"] = prefix_lengths_p
    return found


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
    packing: Packing | None = None,
) -> Any:
    """Hidden states of tokens that follow a shared prefix and a cache, either, or neither.

    A query sees its prompt's prefix up to that prompt's length, the cache slots below `index`, and the tokens
    given up to itself. Rows are (prompt, sample), row-major: row r belongs to prompt r // (b / p). The prefix
    is read where it lies, never repeated per sample, and gradients flow into it.

    args: arch: static; params: nested dict; tokens_bt: ids; positions_bt: rotary positions, counted by the
        caller from the start of the prompt; prefix: what a forward over the p prompts returned;
        prefix_lengths_p: tokens of each prompt; cache: from `init_cache`, of b rows; index: the slot where
        these tokens go, the same for all rows; counts_b: where given the cache is a ring, and of its slots a row
        sees that many, the last of them `index`, where its one token goes; packing: where tokens and positions
        are streams [c, n] of the counted positions of b rows, and so are the hidden states; only attention sees
        rows.
    returns: hidden states after the final norm, [b, t, d] in the compute dtype, and the new keys and values:
        the cache with them written from slot `index` on, or without a cache by themselves.
    errors: ValueError where a prefix comes without lengths, a cache without an index, or b is no multiple of
        p.
    """
    if (prefix is None) != (prefix_lengths_p is None):
        raise ValueError("prefix and prefix_lengths_p go together: give both or neither")
    if (cache is None) != (index is None):
        raise ValueError("cache and index go together: give both or neither")
    b, t = tokens_bt.shape if packing is None else packing.slot_bt.shape
    if prefix_lengths_p is not None and b % prefix_lengths_p.shape[0]:
        raise ValueError(f"{b} rows do not divide over {prefix_lengths_p.shape[0]} prompts")
    seen = masks(arch, t, prefix, prefix_lengths_p, cache, index, counts_b, packing)
    decoder: Any = Decoder(arch)  # what apply returns depends on flags that type checkers cannot follow
    return decoder.apply({"params": params}, tokens_bt, positions_bt, seen, prefix, cache, packing)


def forward_group(
    arch: Architecture,
    params: Any,
    prompt_tokens_ps: jax.Array,
    prompt_lengths_p: jax.Array,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    packing: Packing | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states of prompts and of tokens that follow them, as two calls of `forward` give them.

    Layer by layer for both: there is one gradient of a kernel, and on one device one matmul by it; where kernels are
    cut over devices they are gathered once for the two.

    args: as `forward`; packing: of the tokens that follow.
    returns: hidden states [p, s, d] and [b, t, d], or of streams.
    """
    s, t = prompt_tokens_ps.shape[1], tokens_bt.shape[1] if packing is None else packing.slot_bt.shape[1]
    seen = (masks(arch, s), masks(arch, t, packing=packing))
    seen[1].update(prefix=jnp.arange(s)[None, :] < prompt_lengths_p[:, None], prefix_lengths=prompt_lengths_p)
    positions = (jnp.broadcast_to(jnp.arange(s), prompt_tokens_ps.shape), positions_bt)
    tokens = (prompt_tokens_ps, tokens_bt)
    decoder: Any = Decoder(arch)
    if not sharding.one_device():
        return decoder.apply({"params": params}, tokens, positions, seen, packing=packing)[0]
    in_turn = [jnp.concatenate([x.reshape(1, -1) for x in pair], axis=1) for pair in (tokens, positions)]
    hidden_1nd, _ = decoder.apply({"params": params}, *in_turn, seen, packing=packing)
    prompts, rest = jnp.split(hidden_1nd, [prompt_tokens_ps.size], axis=1)
    return prompts.reshape(*prompt_tokens_ps.shape, -1), rest.reshape(*tokens_bt.shape, rest.shape[-1])


def logits(arch: Architecture, params: Any, hidden: jax.Array) -> jax.Array:
    """Next-token logits of hidden states.

    args: arch: static; params: nested dict; hidden: [..., d].
    returns: float32 [..., v].
    """
    rows = head_rows(arch, params).astype(hidden.dtype)
    contract = (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(hidden, rows, contract, preferred_element_type=parameters.wide(hidden.dtype))


def head_rows(arch: Architecture, params: Any) -> jax.Array:
    """The head's matrix [v, d]."""
    return params["embed" if arch.tie_embeddings else "head"]["embedding"]


def init_cache(arch: Architecture, rows: int, length: int) -> KV:
    """An empty cache: zeros in the compute dtype, with `length` slots for each of `rows` sequences."""

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
