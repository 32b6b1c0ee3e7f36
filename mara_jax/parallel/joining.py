"""How several processes become one program: which of them this is, and jax's part in it."""

import contextlib
import ctypes
import functools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv

from mara_jax.parallel import watch
from mara_jax.parallel.meeting import SECONDS, Place
from mara_jax.parallel.roll import LOST

JAX_SECONDS = 100  # of silence, after which jax ends all processes where nobody else watches
LATER = 86400  # and where `watch` does: processes that were all frozen together, as with a virtual machine, may go on
_CURE = "give each --coordinator_address=HOST:PORT (of process 0), --num_processes=N and --process_id=I"
_NAMES = ("coordinator_address", "num_processes", "process_id")


def place_of(address: str | None, processes: int | None, process: int | None) -> Place | None:
    """The place of this process among those of a run; None where it is the only one.

    jax finds the processes of TPU pods, SLURM steps of several tasks and Open MPI; elsewhere give all three arguments.

    Args:
      address: HOST:PORT of process 0, reachable by all.
      processes: how many.
      process: which of them this is, from 0.

    Raises:
      ValueError: some but not all are given, they contradict each other, or the cluster does not tell.
    """
    arguments = distributed_arguments(os.environ, address, processes, process)
    if arguments is None:
        return None
    if arguments:
        return Place(*(arguments[name] for name in _NAMES))
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        where, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            given, None, None, None, None, int(SECONDS)
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the cluster does not tell the processes of each other ({reason}): {_CURE}") from error
    if where is None:
        return None  # one TPU host, apart from any pod
    if count is None or number is None:
        raise ValueError(f"the cluster does not tell the processes of each other: {_CURE}")
    return Place(where, count, number, None if devices is None else tuple(devices))


def join(place: Place, timeout: float) -> None:
    """Joins this process to the others, before any computation.

    Args:
      timeout: seconds after which `watch` gives up a silent process, and jax's own none; 0: jax's is alone.

    Raises:
      ValueError: the processes do not find each other.
    """
    # Its handler of SIGTERM would take the place of ours, which runs of one process have, too.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _later_than_watch() if timeout else contextlib.nullcontext():
            jax.distributed.initialize(
                place.address,
                place.count,
                place.process,
                local_device_ids=place.local_devices,
                # Otherwise jax would ask any cluster it thinks it sees for what was not given.
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=LATER if timeout else JAX_SECONDS,
            )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the processes did not find each other ({reason}): start all of them with the same "
            "--coordinator_address and --num_processes, and each with its own --process_id"
        ) from error


@contextlib.contextmanager
def _later_than_watch() -> Iterator[None]:
    """Inside, jax makes a client that gives `watch` the time to name the process that is gone.

    As soon as the connection to process 0 breaks, the client would end this process from within C++, with a page of
    text. It takes a callback instead, though jax passes none on. As no C++ status can become a Python object, calling
    it raises in C++ where nothing catches, and so calls the terminate handler, which waits. Where jaxlib can
    convert it some day, the callback itself waits.
    """
    jaxlib: Any = vars(distributed)["_jax"]  # private, as the argument is
    original = jaxlib.get_distributed_runtime_client
    with contextlib.suppress(OSError, AttributeError):  # another C++ library: then it ends as jax has it
        _wait_before_terminating()
        patched = functools.partial(original, missed_heartbeat_callback=_lost_connection)
        jaxlib.get_distributed_runtime_client = patched
    try:
        yield
    finally:
        jaxlib.get_distributed_runtime_client = original


def _lost_connection(*_: Any) -> None:
    time.sleep(watch.SETTLING)
    print("mara_jax: the connection to the coordinator of process 0 is lost", file=sys.stderr)
    watch.end_at_once(LOST)


def _wait_before_terminating() -> None:
    """Before an error in a C++ thread ends this process, `watch` may name another process that has caused it."""
    kind = ctypes.CFUNCTYPE(None)
    set_handler = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE  # std::set_terminate
    set_handler.argtypes, set_handler.restype = [kind], kind

    def wait() -> None:
        time.sleep(watch.SETTLING)
        _handlers[1]()

    _handlers[:] = [kind(wait)]
    _handlers.append(set_handler(_handlers[0]))


_handlers: list[Any] = []  # ours, which C++ calls, and the one that it replaces


def distributed_arguments(
    environment: Mapping[str, str], address: str | None, processes: int | None, process: int | None
) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize: those given, {} where jax finds them itself, None for one process.

    Raises:
      ValueError: as `place_of`.
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
