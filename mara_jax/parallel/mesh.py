"""The mesh of devices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")  # outermost first: the devices of a tensor axis are neighbours
REMAINING = -1  # the size that stands for "the devices that the other axes leave"


def resolve_sizes(wanted: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of each mesh axis, with -1 resolved.

    Args:
      wanted: size of each of AXES; -1 for at most one of them.
      devices: how many there are.

    Raises:
      ValueError: the sizes do not multiply to `devices`.
    """
    product = " x ".join(f"mesh.{axis}={wanted[axis]}" for axis in AXES)
    open_axes = [axis for axis in AXES if wanted[axis] == REMAINING]
    if len(open_axes) > 1 or any(size < 1 and size != REMAINING for size in wanted.values()):
        raise ValueError(f"{product}: each size is at least 1, and one of them may be -1 for the devices that are left")
    fixed = math.prod(size for size in wanted.values() if size != REMAINING)
    if not open_axes and fixed != devices:
        raise ValueError(f"{product} makes {fixed} devices, there are {devices}: let one of the sizes be -1")
    if devices % fixed:
        raise ValueError(f"{product}: {fixed} does not divide the {devices} devices; choose sizes whose product does")
    return {axis: devices // fixed if wanted[axis] == REMAINING else wanted[axis] for axis in AXES}


def make_mesh(wanted: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of the given sizes over all devices of all processes, or over `devices`.

    Its axes are Auto: the compiler places what nothing constrains.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or do not suit several slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = resolve_sizes(wanted, len(devices))
    placed = _device_array(tuple(shape[axis] for axis in AXES), devices)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _device_array(shape: tuple[int, ...], devices: Sequence[Any]) -> Any:
    """The devices as an array of this shape, neighbours along the axes that communicate most.

    jax.make_mesh would refuse GPUs of several hosts, several TPU slices, and most shapes on a v6e or v5p slice, such as
    4 x 2 x 2 on 4 x 4 chips.

    Raises:
      ValueError: several TPU slices, which a slow network joins, and neither data nor fsdp that they divide.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, fsdp, _ = shape
    across = (math.gcd(data, slices), math.gcd(fsdp, slices // math.gcd(data, slices)), 1)
    if math.prod(across) != slices:
        product = " x ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(f"{product} on {slices} slices: let mesh.data times mesh.fsdp be a multiple of {slices}")
    within = [size // factor for size, factor in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
