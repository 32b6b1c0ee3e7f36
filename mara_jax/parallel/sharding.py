"""Where every array lives: one table from logical axes to mesh axes, and the shardings that follow from it.

Parameters, batches and activations name their axes by meaning ("embed", "rows"); only this table knows the mesh. The
layout in use is part of jit's cache key, so one process may use several in turn.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axes. One array never uses a mesh axis twice: activations do not shard "embed" (None), because
# their rows already use fsdp.
TABLE: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),  # prompts x samples, or the streams they are packed into
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "members": ("data",),  # of a population, each of which lies whole on a device
}

# Pairs of axes that one activation has, such as [rows, time, heads]: they must lie on different mesh axes.
ACTIVATION_AXES = (("rows", "heads"), ("rows", "kv_heads"), ("rows", "mlp"), ("rows", "vocab"))

# The last two axes of the kernels whose outputs are the residual stream, see `param_sharding`.
OUTPUT_KERNELS = (("heads", "embed"), ("mlp", "embed"))

# Path of a parameter in the nested dict -> its shape and logical axes.
ParamAxes = Mapping[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]


@dataclass(frozen=True)
class Layout:
    """A mesh and the table in force on it, as sorted pairs (so that it is hashable)."""

    mesh: Mesh
    table: tuple[tuple[str, tuple[str, ...]], ...]


def layout(mesh: Mesh, overrides: str = "") -> Layout:
    """A mesh with the table, some of its rows replaced.

    Args:
      overrides: LOGICAL:MESH pairs separated by commas, as in "kv_heads:none,embed:data+fsdp".

    Raises:
      ValueError: an override is no such pair, names an unknown axis, or puts on one mesh axis what one activation has.
    """
    rows = dict(TABLE)
    for pair in overrides.replace(" ", "").split(","):
        if not pair:
            continue
        logical, colon, named = pair.partition(":")
        if not colon or logical not in rows:
            raise ValueError(f"mesh.overrides has {pair!r}: write LOGICAL:MESH, where LOGICAL is one of {_words(rows)}")
        axes = () if named == "none" else tuple(named.split("+"))
        unknown = [axis for axis in axes if axis not in mesh.axis_names]
        if unknown or len(set(axes)) < len(axes):
            raise ValueError(
                f"mesh.overrides has {pair!r}: the mesh axes are {_words(mesh.axis_names)}, each at most once, joined "
                "by + (or none)"
            )
        rows[logical] = axes
    chosen = Layout(mesh, tuple(sorted(rows.items())))
    for pair in ACTIVATION_AXES:
        partition_spec(chosen, pair, "an activation")
    return chosen


def _words(names: Any) -> str:
    return ", ".join(names)


def shard_count(logical: str, layout: Layout | None = None) -> int:
    """How many shards a logical axis has in `layout`, or in the layout in use; 1 where there is none."""
    layout = current() if layout is None else layout
    return 1 if layout is None else math.prod(layout.mesh.shape[axis] for axis in dict(layout.table)[logical])


def partition_spec(layout: Layout, axes: Sequence[str | None], what: str = "an array") -> PartitionSpec:
    """Where each axis of an array goes.

    Args:
      axes: its logical axes; None stays whole.
      what: its name, for the error.

    Raises:
      ValueError: an axis that the table lacks, or two axes on one mesh axis of more than one device.
    """
    table, taken, entries = dict(layout.table), {}, []
    for logical in axes:
        if logical is not None and logical not in table:
            raise ValueError(f"{what} has the logical axis {logical!r}, which the table lacks: it has {_words(table)}")
        mesh_axes = tuple(a for a in table[logical] if layout.mesh.shape[a] > 1) if logical is not None else ()
        for axis in mesh_axes:
            if axis in taken:
                raise ValueError(
                    f"{what} would have both {taken[axis]!r} and {logical!r} on mesh axis {axis!r} "
                    f"(size {layout.mesh.shape[axis]}): send one elsewhere with mesh.overrides={logical}:none"
                )
            taken[axis] = logical
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def named_sharding(
    layout: Layout, axes: Sequence[str | None], shape: Sequence[int] | None = None, what: str = "an array"
):
    """The NamedSharding of an array.

    Args:
      axes, what: as `partition_spec`.
      shape: where given, each size must divide.

    Raises:
      ValueError: as `partition_spec`, or a size that its mesh axes do not divide.
    """
    for size, logical in zip(shape or (), axes, strict=bool(shape)):
        if logical is not None:
            check_divisible(layout, {logical: size}, what)
    return NamedSharding(layout.mesh, partition_spec(layout, axes, what))


def check_divisible(layout: Layout, counts: Mapping[str, int], what: str = "the model") -> None:
    """Refuses sizes that the mesh does not divide.

    Args:
      counts: how many of each logical axis there are: heads rather than heads times their width.

    Raises:
      ValueError: with the size, the mesh axes and the cure.
    """
    table = dict(layout.table)
    for logical, count in counts.items():
        if count % shard_count(logical, layout):
            sizes = " x ".join(f"mesh.{axis}={layout.mesh.shape[axis]}" for axis in table[logical])
            raise ValueError(
                f"{what} has {count} on its axis {logical!r}, which {sizes} does not divide: "
                f"choose sizes that do, or keep that axis whole with mesh.overrides={logical}:none"
            )


def replicated(layout: Layout) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(layout.mesh, PartitionSpec())


def param_shardings(layout: Layout, leaves: ParamAxes) -> dict[str, Any]:
    """The sharding of every parameter, as a nested dict.

    Raises:
      ValueError: a collision, or a size that does not divide.
    """
    tree: dict[str, Any] = {}
    for path, (shape, axes) in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = param_sharding(layout, axes, shape, "/".join(path))
    return tree


def param_sharding(
    layout: Layout, axes: Sequence[str | None], shape: Sequence[int], what: str = "an array"
) -> NamedSharding:
    """The sharding of a parameter between its uses: as the table says, but output kernels are sharded by their inputs.

    The mesh axes that would shard the outputs ("embed") of such a kernel shard its inputs further, where their number
    divides. XLA for GPUs all-gathers along an array's first axis alone; of a kernel sharded along its last axis it
    keeps a transposed copy, in float32 and of all layers at once.

    Args and errors as of `named_sharding`.
    """
    by_table = named_sharding(layout, axes, shape, what)
    if tuple(axes[-2:]) not in OUTPUT_KERNELS:
        return by_table
    *leading, inputs, outputs = (
        entry if isinstance(entry, tuple) else (entry,) * bool(entry) for entry in by_table.spec
    )
    joined = (*inputs, *outputs)
    if not outputs or shape[-2] % math.prod(layout.mesh.shape[axis] for axis in joined):
        return by_table
    entries = (entry[0] if len(entry) == 1 else entry or None for entry in (*leading, joined, ()))
    return NamedSharding(layout.mesh, PartitionSpec(*entries))


def opt_state_shardings(layout: Layout, tx: optax.GradientTransformation, shapes: Any, shardings: Any) -> Any:
    """The sharding of every array of an optimiser's state: a parameter's moments have the parameter's own.

    Args:
      shapes: the state, or its shapes.
      shardings: of the parameters, from `param_shardings`.
    """
    return optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        shapes,
        shardings,
        transform_non_params=lambda _: replicated(layout),
    )


def row_axes(layout: Layout, prompts: int, samples: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes of the prompts, and those of the samples in a group, in arrays [p, g, ...].

    Whole groups go to a device as far as the number of prompts allows; else the outer mesh axes divide the prompts
    and the inner ones the groups, so that the rows p x g, counted in that order, are cut into equal shards. It decides
    where a row is computed and nothing else: what is reduced over a group is reduced over the whole of it.

    Raises:
      ValueError: neither divides.
    """
    axes = tuple(a for a in dict(layout.table)["rows"] if layout.mesh.shape[a] > 1)
    for split in range(len(axes), -1, -1):
        outer, inner = (math.prod(layout.mesh.shape[a] for a in part) for part in (axes[:split], axes[split:]))
        if prompts % outer == 0 and samples % inner == 0:
            return axes[:split], axes[split:]
    shards = math.prod(layout.mesh.shape[a] for a in axes)
    raise ValueError(
        f"{prompts} prompts (rollout.prompts_per_step) x {samples} samples (rollout.group_size, in each of "
        f"optimiser.micro_batches) cannot be cut into {shards} equal parts "
        f"({' x '.join(f'mesh.{a}={layout.mesh.shape[a]}' for a in axes)}): make either a multiple of {shards}"
    )


def row_shardings(layout: Layout, prompts: int, samples: int) -> tuple[NamedSharding, NamedSharding]:
    """The shardings of arrays [p, ...] and [p, g, ...]; whole on every device where the rows do not divide.

    Training refuses numbers of rows that do not divide (see `row_axes`); measurements may have any.
    """
    try:
        outer, inner = row_axes(layout, prompts, samples)
    except ValueError:
        outer, inner = (), ()
    return NamedSharding(layout.mesh, PartitionSpec(outer or None)), NamedSharding(
        layout.mesh, PartitionSpec(outer or None, inner or None)
    )


# A Layout; or a platform's name, where nothing is placed; or None, which is this machine's own platform.
_IN_USE = jax.make_user_context(None)


@contextmanager
def use(layout: Layout | None) -> Iterator[None]:
    """Places and constrains arrays by `layout` inside; does nothing without one, or with this machine's one device.

    A device of another kind than this machine's is one that programs are only compiled for.
    """
    nothing = layout is None or (layout.mesh.size == 1 and _platform(layout) == jax.default_backend())
    with _IN_USE(None if nothing else layout):
        yield


@contextmanager
def without_layout() -> Iterator[None]:
    """Places and constrains nothing inside, as in the body of a jax.shard_map; `platform` stays that of the layout."""
    with _IN_USE(platform()):
        yield


def _platform(layout: Layout) -> str:
    # A mesh without devices serves shapes alone.
    return layout.mesh.devices.flat[0].platform if isinstance(layout.mesh, Mesh) else jax.default_backend()


def platform() -> str:
    """What the layout in use computes on, "cpu", "gpu" or "tpu": this machine's devices where there is no layout."""
    value = _IN_USE.value
    if isinstance(value, Layout):
        return _platform(value)
    return jax.default_backend() if value is None else value


def current() -> Layout | None:
    """The layout in use."""
    return _IN_USE.value if isinstance(_IN_USE.value, Layout) else None


def one_device() -> bool:
    """Whether the layout in use, or the lack of one, has a single device."""
    layout = current()
    return layout is None or layout.mesh.size == 1


def constrain_groups(array_pg: jax.Array) -> jax.Array:
    """Under jit: keeps an array [p, g, ...] where `row_shardings` says."""
    layout = current()
    if layout is None:
        return array_pg
    return jax.lax.with_sharding_constraint(array_pg, row_shardings(layout, *array_pg.shape[:2])[1])


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Under jit: keeps an array where the table says; an axis that does not divide stays whole.

    Args:
      axes: logical axis of each of the array's axes, None for whole; those at the end may be left out.
    """
    layout = current()
    if layout is None:
        return array
    fits = [
        a if a is None or size % shard_count(a, layout) == 0 else None
        for a, size in zip(axes, array.shape, strict=False)
    ]
    return jax.lax.with_sharding_constraint(
        array, NamedSharding(layout.mesh, partition_spec(layout, fits, "an activation"))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_kernel(kernel: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Under jit: a kernel all-gathered along "embed", as FSDP does before a matmul; its gradient is sharded again.

    Args:
      axes: the kernel's logical axes.
    """
    return _without_fsdp(kernel, axes)


def _without_fsdp(kernel, axes):
    return constrain(kernel, *(None if axis == "embed" else axis for axis in axes))


def _gather_kernel_fwd(kernel, axes):
    return _without_fsdp(kernel, axes), None  # by its primitives, so that remat can choose


def _gather_kernel_bwd(axes, _, g):
    layout = current()
    return (g if layout is None else jax.lax.with_sharding_constraint(g, param_sharding(layout, axes, g.shape)),)


gather_kernel.defvjp(_gather_kernel_fwd, _gather_kernel_bwd)


def embedding_lookup(table_vd: jax.Array, ids_bt: jax.Array, dtype: Any) -> jax.Array:
    """Under jit: rows of a table ("vocab", "embed"), as activations [b, t, d] of a dtype, sharded by "rows".

    A table that is sharded along "embed" is not all-gathered: each device looks up its own channels for the tokens of
    all devices that share the table, and the activations are exchanged. Neither the table nor its gradient is ever
    whole on a device.
    """
    layout = current()
    if layout is None:
        return table_vd[ids_bt].astype(dtype)
    channels = dict(layout.table)["embed"]
    outer = tuple(axis for axis in dict(layout.table)["rows"] if axis not in channels)
    sharded = [tuple(axis for axis in axes if layout.mesh.shape[axis] > 1) for axes in (outer, channels)]
    sizes = (ids_bt.shape[0], table_vd.shape[1])
    outer, channels = (
        axes if size % math.prod(layout.mesh.shape[axis] for axis in axes) == 0 else ()
        for axes, size in zip(sharded, sizes, strict=True)
    )

    def place(array: jax.Array, *axes: tuple[str, ...]) -> jax.Array:
        entries = (axis or None for axis in axes)
        return jax.lax.with_sharding_constraint(array, NamedSharding(layout.mesh, PartitionSpec(*entries)))

    rows_btd = constrain(table_vd, "vocab", "embed")[place(ids_bt, outer)].astype(dtype)
    return constrain(place(rows_btd, outer, (), channels), "rows")
