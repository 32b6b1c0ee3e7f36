"""A policy as a decoding loop reads it: unrolled, in the compute dtype, cut over devices only where activations are."""

import dataclasses
from typing import Any

import jax

from mara_jax.parallel import sharding
from mara_jax.policies import lora, parameters, transformer, vocabulary
from mara_jax.policies.ops.select import select
from mara_jax.policies.parameters import Architecture
from mara_jax.policies.transformer import KV


def lay_out(arch: Architecture, params: Any, prefix: KV, merge: bool = True) -> tuple[Architecture, Any, KV]:
    """The same policy and prefix laid out for a decoding loop.

    Layers are unrolled; parameters are in the compute dtype and, but for the tensor axis, whole on every device;
    kernels are as a matmul of few rows takes them fastest. Call it once, before the loop: what it copies is read at
    every step, and what it gathers a TPU would gather anew for every token. An adapter is merged into its kernels, but
    not in bfloat16: the merged kernel would be rounded, and samples would not come from the policy that is trained.

    merge: False keeps an adapter beside its kernels, as where several adapters share them.
    """
    if merge and arch.compute_dtype != "bfloat16":
        params = lora.merged(params)
    if arch.scan_layers:
        params = parameters.to_unrolled(params, arch.layers)
        prefix = KV(*(tuple(x[i] for i in range(arch.layers)) for x in (prefix.k, prefix.v)))
        arch = dataclasses.replace(arch, scan_layers=False)
    params = _gathered(arch, params)
    return arch, _with_decoding_kernels(arch, params), prefix


def _gathered(arch: Architecture, params: Any) -> Any:
    """Parameters as a decoding loop reads them, cut only where activations are cut alike."""
    tree = jax.tree.map(lambda x: x, params)  # an adapter's arrays, which are small, stay as they are
    for path, (_, axes) in parameters.leaf_shapes(arch).items():
        array = parameters.at(params, path)
        if path[-1] != "scale":  # norms are computed in float32
            array = array.astype(arch.compute_dtype)
        array = sharding.constrain(array, *(None if axis == "embed" else axis for axis in axes))
        if path[-1] == "embedding":
            # XLA would look tokens up before the cast: in a table that it gathers once more, in float32.
            array = jax.lax.optimization_barrier(array)
        parameters.put(tree, path, array)
    return tree


def _with_decoding_kernels(arch: Architecture, params: Any) -> Any:
    if not isinstance(params, dict):
        return params
    tree = {name: _with_decoding_kernels(arch, value) for name, value in params.items()}
    return tree | ({"kernel": select(arch).decoding_kernel(params["kernel"])} if "kernel" in params else {})


def logits(arch: Architecture, params: Any, hidden_bd: jax.Array) -> jax.Array:
    """As `transformer.logits`, for the few rows of a decoding step; ids without a token are masked."""
    rows_vd = transformer.head_rows(arch, params)
    logits_bv = select(arch).matmul_few_rows(hidden_bd, rows_vd, parameters.wide(hidden_bd.dtype))
    return vocabulary.masked(logits_bv, arch.without_token)
