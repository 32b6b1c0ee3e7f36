"""What a model is made of: its architecture, and the one table that names every parameter.

Each row of the table is one tensor of a Hugging Face checkpoint: where it lives in our tree, its shape and
logical axes there, what the checkpoint calls it and whether it is stored transposed. Initialisation, loading,
exporting and sharding all read this table, so none of them can disagree with another about a name or a shape.
"""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mara_jax.config.schema import ATTENTIONS, COMPUTE_DTYPES, LORA_TARGETS, REMATS
from mara_jax.parallel import sharding
from mara_jax.policies.families import FAMILIES, Family


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained on.

    kind 'linear' divides every frequency by `factor`; 'llama3' does so only for wavelengths longer than
    `original_max_positions / low_freq_factor`, leaves those shorter than `original_max_positions /
    high_freq_factor` alone and blends in between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class Lora:
    """Which kernels are trained by a low-rank update alone, W + alpha / rank * a @ b, and its size (see `lora`).

    targets: names out of LORA_TARGETS, in that order.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f"an adapter has rank={self.rank}, alpha={self.alpha}: both must be positive")
        if not self.targets or self.targets != tuple(name for name in LORA_TARGETS if name in self.targets):
            raise ValueError(
                f"an adapter has targets={self.targets}: name some of {', '.join(LORA_TARGETS)}, in this order"
            )

    @property
    def scale(self) -> float:
        """What a @ b is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Architecture:
    """The static description of a decoder: hashable, so that it can be a static argument of a jitted
    function.

    `family` names the row of `FAMILIES` that says the rest. `scan_layers` stacks the layers on a leading axis and scans
    them (fast to compile, for accelerators); otherwise they are unrolled, each with arrays of its own (XLA:CPU copies
    every slice of a stacked array). `attention` is computed, in training, by "xla", by "kernels" that keep no scores,
    or by what `ops.select.uses_kernels` finds ("auto"). `remat` names what the backward pass recomputes instead of
    keeping: "none", "elementwise" (matmul results are kept) or "layer" (only each layer's input is kept). `lora` is set
    where an adapter is trained in place of all parameters. `without_token` are the rows of the vocabulary that stand
    for no token, as ranges (first, last + 1): see `vocabulary`. `score_head` puts one row, of a reward model, in the
    place of the LM head (see `scores`).
    """

    family: str
    vocab_size: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    max_positions: int = 32768
    scan_layers: bool = False
    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    lora: Lora | None = None
    without_token: tuple[tuple[int, int], ...] = ()
    score_head: bool = False

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family {self.family!r}: this code knows {', '.join(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide over {self.kv_heads} kv heads: use a multiple")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary embedding pairs its channels, so it must be even")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}: use one of {', '.join(COMPUTE_DTYPES)}")
        if self.compute_dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError("compute_dtype is 'float64', which jax has only with JAX_ENABLE_X64=1 in the environment")
        if self.remat not in REMATS:
            raise ValueError(f"remat is {self.remat!r}: use one of {', '.join(REMATS)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention is {self.attention!r}: use one of {', '.join(ATTENTIONS)}")
        if self.lora is not None and self.lora.rank > self.embed:
            raise ValueError(
                f"the adapter's rank is {self.lora.rank}, but the model is {self.embed} wide: use at most that, as "
                "more costs more than training the kernels themselves"
            )

    @property
    def traits(self) -> Family:
        """What the models of its family have in common."""
        return FAMILIES[self.family]


def wide(dtype: Any) -> Any:
    """What norms, softmax, log-probs and losses are computed in: float32, or float64 for a model that uses it."""
    return jnp.promote_types(dtype, jnp.float32)


@dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint and its place in our tree.

    path: keys of the nested dict; shape and axes: of that one tensor in our layout, without the stacked layer
    axis; name: what a Hugging Face checkpoint calls it; transpose: whether it is stored there as [out, in]
    where we keep [in, out]; std: of its initial normal draw (0: the constant `fill`); layer: its index on the
    stacked axis of a scanned tree, None where nothing is stacked.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    name: str
    transpose: bool
    std: float
    fill: float = 0.0
    layer: int | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of this tensor in a Hugging Face checkpoint."""
        return self.shape[::-1] if self.transpose else self.shape


def _layer_rows(arch: Architecture, index: int) -> Iterator[Row]:
    """The rows of one decoder layer: attention's, then the feed-forward's, each with its norm first."""
    d, f, h, traits = arch.embed, arch.mlp, arch.head_dim, arch.traits
    root = ("layers",) if arch.scan_layers else (f"layers_{index}",)
    layer = index if arch.scan_layers else None
    prefix = f"model.layers.{index}."

    def norm(ours: str, theirs: str, size: int, axis: str | None) -> Row:
        path, name = (*root, ours, "scale"), f"{prefix}{theirs}.weight"
        return Row(path, (size,), (axis,), name, False, 0.0, 1.0, layer)

    def linear(ours: str, theirs: str, shape: tuple[int, int], axes: tuple[str, str], bias: bool = False, gain=1.0):
        # Kernels are kept [in, out]: the activations' matmul then reads them as they lie, on CPU and TPU
        # alike.
        path, name = (*root, ours), f"{prefix}{theirs}"
        yield Row((*path, "kernel"), shape, axes, f"{name}.weight", True, gain * shape[0] ** -0.5, 0.0, layer)
        if bias:
            yield Row((*path, "bias"), shape[1:], axes[1:], f"{name}.bias", False, 0.0, 0.0, layer)

    heads, kv, residual = arch.heads * h, arch.kv_heads * h, (2 * arch.layers) ** -0.5
    attn_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"
    if traits.norm_outputs:
        attn_norm, mlp_norm = "post_attention_layernorm", "post_feedforward_layernorm"
    yield norm("attn_norm", attn_norm, d, "embed")
    yield from linear("q", "self_attn.q_proj", (d, heads), ("embed", "heads"), traits.qkv_bias)
    yield from linear("k", "self_attn.k_proj", (d, kv), ("embed", "kv_heads"), traits.qkv_bias)
    yield from linear("v", "self_attn.v_proj", (d, kv), ("embed", "kv_heads"), traits.qkv_bias)
    if traits.qk_norm == "each_head":
        yield norm("q_norm", "self_attn.q_norm", h, None)
        yield norm("k_norm", "self_attn.k_norm", h, None)
    if traits.qk_norm == "all_heads":
        yield norm("q_norm", "self_attn.q_norm", heads, "heads")
        yield norm("k_norm", "self_attn.k_norm", kv, "kv_heads")
    yield from linear("o", "self_attn.o_proj", (heads, d), ("heads", "embed"), gain=residual)
    yield norm("mlp_norm", mlp_norm, d, "embed")
    yield from linear("gate", "mlp.gate_proj", (d, f), ("embed", "mlp"))
    yield from linear("up", "mlp.up_proj", (d, f), ("embed", "mlp"))
    yield from linear("down", "mlp.down_proj", (f, d), ("mlp", "embed"), gain=residual)


SCORE = ("score", "kernel")  # the path of a reward model's head


def table(arch: Architecture) -> tuple[Row, ...]:
    """Every parameter of a model, one row for each tensor of its Hugging Face checkpoint.

    args: arch.
    returns: rows, layer after layer, whose order decides what `init` draws; a tied head has no row of its own, and a
        reward model none but that of its score.
    """
    v, d = arch.vocab_size, arch.embed
    rows = [Row(("embed", "embedding"), (v, d), ("vocab", "embed"), "model.embed_tokens.weight", False, 0.02)]
    for index in range(arch.layers):
        rows.extend(_layer_rows(arch, index))
    rows.append(Row(("final_norm", "scale"), (d,), ("embed",), "model.norm.weight", False, 0.0, 1.0))
    if arch.score_head:
        rows.append(Row(SCORE, (d, 1), ("embed", None), "score.weight", True, d**-0.5))
    elif not arch.tie_embeddings:
        # Like the embedding, the head is kept [vocab, embed]: XLA:CPU multiplies by its transpose twice as
        # fast.
        rows.append(Row(("head", "embedding"), (v, d), ("vocab", "embed"), "lm_head.weight", False, 0.02))
    return tuple(rows)


def leaf_shapes(arch: Architecture) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Shape and logical axes of each array of the parameter tree, by path (a stacked axis is 'layers')."""
    return shapes_of(table(arch), arch.layers)


def shapes_of(
    rows: Iterable[Row], layers: int
) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """As `leaf_shapes`, of any rows of a model of so many layers."""
    out = {}
    for row in rows:
        stacked = row.layer is not None
        shape = (layers, *row.shape) if stacked else row.shape
        out[row.path] = (shape, ("layers", *row.axes) if stacked else row.axes)
    return out


def axis_sizes(arch: Architecture) -> dict[str, int]:
    """How many of each logical axis there are: heads, not their channels, since a head is not cut."""
    return {
        "vocab": arch.vocab_size,
        "embed": arch.embed,
        "heads": arch.heads,
        "kv_heads": arch.kv_heads,
        "mlp": arch.mlp,
        "layers": arch.layers,
    }


def shardings(arch: Architecture, layout: sharding.Layout) -> dict[str, Any]:
    """Where a layout puts each parameter, as a nested dict.

    errors: ValueError for two axes of an array on one mesh axis, and for sizes that the mesh does not divide.
    """
    sharding.check_divisible(layout, axis_sizes(arch))
    return sharding.param_shardings(layout, leaf_shapes(arch))


def count(arch: Architecture) -> int:
    """Number of parameters (a tied head counts once)."""
    total = 0
    for row in table(arch):
        size = 1
        for dim in row.shape:
            size *= dim
        total += size
    return total


def at(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The array at a path of the nested dict."""
    node: Any = params
    for key in path:
        node = node[key]
    return node


def put(params: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the array at a path of the nested dict, making the dicts on the way."""
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def read(params: Mapping[str, Any], row: Row) -> Any:
    """The tensor of one row, in our layout, out of an unrolled or scanned tree."""
    leaf = at(params, row.path)
    return leaf if row.layer is None else leaf[row.layer]


@partial(jax.jit, static_argnames="shape")
def _draw(key: jax.Array, number: int, std: float, fill: float, shape: tuple[int, ...]) -> jax.Array:
    # One program per shape: a model has many parameters but few shapes.
    return fill + std * jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)


def init(arch: Architecture, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters, the same numbers whether layers are scanned or unrolled.

    Kernels are normal with variance 1 / fan_in (those that write to the residual stream also 1 / (2 layers)),
    embeddings normal with deviation 0.02, biases zero, norms one.

    args: arch; key: a jax random key.
    returns: nested dict of float32 arrays.
    """

    arrays_of: dict[tuple[str, ...], list[jax.Array]] = {}
    stacked = set()
    for number, row in enumerate(table(arch)):
        arrays_of.setdefault(row.path, []).append(_draw(key, number, row.std, row.fill, row.shape))
        if row.layer is not None:
            stacked.add(row.path)
    params: dict[str, Any] = {}
    for path, arrays in arrays_of.items():
        put(params, path, jnp.stack(arrays) if path in stacked else arrays[0])
    return params


def to_unrolled(params: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Take the stacked 'layers' of a tree apart into 'layers_0', 'layers_1', ..., each in its own arrays."""
    unlayered = {name: tree for name, tree in params.items() if name != "layers"}
    for index in range(layers):
        unlayered[f"layers_{index}"] = jax.tree.map(operator.itemgetter(index), params["layers"])
    return unlayered
