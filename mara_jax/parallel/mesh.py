"""The mesh of devices, and how several processes become one program."""

import math
import os
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


def join_processes(address: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of one run; does nothing where there is only one. Before any computation.

    jax finds the processes of TPU pods, SLURM steps of several tasks and Open MPI; elsewhere give all three arguments.

    Args:
      address: HOST:PORT of process 0, reachable by all.
      processes: how many.
      process: which of them this is, from 0.

    Raises:
      ValueError: some but not all are given, they contradict each other, or the processes do not find each other.
    """
    arguments = distributed_arguments(os.environ, address, processes, process)
    if arguments is None:
        return
    # Its handler of SIGTERM would take the place of ours, which runs of one process have, too.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        if not arguments and "coordinator_address should be defined" in str(error):
            return  # one TPU host, apart from any pod
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the processes did not find each other ({reason}): start all of them with the same "
            "--coordinator_address and --num_processes, and each with its own --process_id"
        ) from error


def distributed_arguments(
    environment: Mapping[str, str], address: str | None, processes: int | None, process: int | None
) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize: those given, {} where jax finds them itself, None for one process.

    Raises:
      ValueError: as `join_processes`.
    """
    arguments = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    if processes is None and process is None and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return {}
        # From version 5 on, Open MPI tells a process its number, but not where process 0 is.
        arguments["num_processes"] = int(environment["OMPI_COMM_WORLD_SIZE"])
        arguments["process_id"] = int(environment["OMPI_COMM_WORLD_RANK"])
    elif all(value is None for value in arguments.values()):
        # The number of tasks in the step, not in the job: a batch script itself is a step of one.
        slurm = int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        # jax sets it where it sees TPU chips and libtpu.
        tpu = "tpu" in (jax.config.jax_platforms or "")  # pyright: ignore[reportAttributeAccessIssue]
        return {} if slurm or tpu else None
    missing = [name for name, value in arguments.items() if value is None]
    if missing:
        raise ValueError(
            f"--{missing[0]} is missing: several processes need --coordinator_address=HOST:PORT (of process 0), "
            "--num_processes=N and --process_id=I"
        )
    _check(arguments["coordinator_address"], arguments["num_processes"], arguments["process_id"])
    # Otherwise jax would ask any cluster it thinks it sees for what was not given.
    return arguments | {"cluster_detection_method": "deactivate"}


def _check(address: Any, processes: Any, process: Any) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator_address={address!r} is no HOST:PORT: give process 0's, as in node0:9876")
    if processes < 1:
        raise ValueError(f"--num_processes={processes} must be at least 1")
    if not 0 <= process < processes:
        raise ValueError(f"--process_id={process} must lie between 0 and {processes - 1} (--num_processes={processes})")
