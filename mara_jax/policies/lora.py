"""Low-rank adapters (LoRA, Hu et al. 2021): kernels stay as they are and a small update beside each is trained.

Three trees of parameters, all plain nested dicts. The adapter holds `lora_a` [in, r] and `lora_b` [r, out] of every
adapted kernel and nothing else: it is what is trained, saved and sharded. Attached, it lies beside the base's own
arrays, which are not copied: any function of the model takes that tree, and x @ W + (x @ a) @ b is computed. Merged,
the update is added to the kernels, and the tree is that of a plain model.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import parameters
from mara_jax.policies.parameters import Architecture, Row

A, B = "lora_a", "lora_b"


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Every factor of the architecture's adapter, as rows like those of the parameter table; none without an adapter.

    Names are those of the peft library, which stores both factors transposed.
    """
    if arch.lora is None:
        return ()
    rank, factors = arch.lora.rank, []
    for row in parameters.table(arch):
        if row.path[-1] != "kernel" or row.path[-2] not in arch.lora.targets:
            continue
        (d_in, d_out), (axis_in, axis_out), root = row.shape, row.axes, row.path[:-1]
        module = "base_model.model." + row.name.removesuffix(".weight")
        name_a, name_b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        # A deviation of 1 / sqrt(3 in) is that of a uniform draw within 1 / sqrt(in).
        factors.append(Row((*root, A), (d_in, rank), (axis_in, None), name_a, True, (3 * d_in) ** -0.5, 0.0, row.layer))
        factors.append(Row((*root, B), (rank, d_out), (None, axis_out), name_b, True, 0.0, 0.0, row.layer))
    return tuple(factors)


def leaf_shapes(arch: Architecture) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Shape and logical axes of each array that is trained: of the adapter, or of the whole model without one."""
    return parameters.leaf_shapes(arch) if arch.lora is None else parameters.shapes_of(rows(arch), arch.layers)


def shardings(arch: Architecture, layout: sharding.Layout) -> dict[str, Any]:
    """Where a layout puts each array that is trained, as a nested dict; errors as of `parameters.shardings`."""
    sharding.check_divisible(layout, parameters.axis_sizes(arch))
    return sharding.param_shardings(layout, leaf_shapes(arch))


def init(arch: Architecture, key: jax.Array) -> dict[str, Any]:
    """A new adapter: b is zero, so that the policy is the base exactly; a as the peft library draws it.

    That is uniform within 1 / sqrt(in) either way; the same numbers whether layers are scanned or unrolled.

    args: arch: with its `lora`; key: a jax random key.
    returns: nested dict of arrays, float32 (float64 for a model computed in it).
    """
    arrays_of: dict[tuple[str, ...], list[jax.Array]] = {}
    dtype = parameters.wide(arch.compute_dtype)
    for number, row in enumerate(rows(arch)):
        arrays_of.setdefault(row.path, []).append(_draw(key, number, row.std, row.shape).astype(dtype))
    adapter: dict[str, Any] = {}
    for path, arrays in arrays_of.items():
        parameters.put(adapter, path, jnp.stack(arrays) if arch.scan_layers else arrays[0])
    return adapter


@partial(jax.jit, static_argnames="shape")
def _draw(key: jax.Array, number: int, std: float, shape: tuple[int, ...]) -> jax.Array:
    return math.sqrt(3) * std * jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -1, 1)


def attached(arch: Architecture, base: Any, trained: Any) -> Any:
    """The parameters of the policy: the base with the adapter beside its kernels.

    args: arch; base: the frozen parameters; trained: the adapter, or, where `arch.lora` is None, all parameters,
        which are then returned as they are.
    returns: nested dict whose `b` are multiplied by alpha / rank; every other array is the one given.
    """
    return trained if arch.lora is None else beside(base, _scaled(trained, arch.lora.scale))


@jax.jit
def _scaled(adapter: Any, scale: float) -> Any:
    def of(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: of(inner, one) for inner, one in value.items()}
        return scale * value if name == B else value

    return of("", adapter)


def beside(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees as one: the adapter's leaves, as they are, among those of the base."""
    out = dict(base)
    for name, value in adapter.items():
        out[name] = beside(base[name], value) if isinstance(value, Mapping) else value
    return out


def merged(params: Any) -> Any:
    """The parameters of a plain model that is the same policy; without an adapter attached they stay as they are.

    args: params: as from `attached`, unrolled or scanned.
    returns: nested dict; an adapted kernel is new, in its own dtype, every other array is the one given.
    """
    if not isinstance(params, Mapping):
        return params
    out = {name: merged(value) for name, value in params.items() if name not in (A, B)}
    if A in params:
        kernel = params["kernel"]
        # An accelerator's default would round both factors to fewer bits than the kernel has.
        update = jnp.matmul(params[A], params[B], precision=jax.lax.Precision.HIGHEST)
        out["kernel"] = (kernel + update).astype(kernel.dtype)
    return out


def count(arch: Architecture) -> int:
    """Number of parameters that are trained."""
    return sum(math.prod(shape) for shape, _ in leaf_shapes(arch).values())
