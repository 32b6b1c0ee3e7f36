"""Chips that a run may be planned for: what one of them has, and devices that programs can be compiled for."""

import contextlib
import importlib.util
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from mara_jax.train import capacity

GIB = 2**30
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:4x4, h100:8 or cpu:8"


@dataclass(frozen=True)
class Chip:
    """What one device has, as its maker publishes it.

    memory: bytes that a program may use; flops: dense matmul FLOP/s by compute dtype; bandwidth: of its memory,
    bytes/s; links: bytes/s that it can send to all others together. Zero where it is not published.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    links: float


def _tpu(name: str, memory: float, flops: float, bandwidth: float, links: float) -> Chip:
    # A float32 matmul of full precision (see `precision`) takes six bfloat16 passes.
    return Chip(name, memory * GIB, {"bfloat16": flops, "float32": flops / 6}, bandwidth, links)


# TPU memory is what the compiler allows (its own message when a program needs more); rates are Google Cloud's pages'.
# H100 SXM: NVIDIA's data sheet, dense; float32 outside the tensor cores, whose TF32 has 11 bits; links: half of
# NVLink's 900 GB/s both ways.
CHIPS = {
    "v5e": _tpu("TPU v5e", 15.75, 197e12, 819e9, 200e9),
    "v5p": _tpu("TPU v5p", 95.74, 459e12, 2765e9, 600e9),
    "v6e": _tpu("TPU v6e", 31.25, 918e12, 1600e9, 400e9),
    "h100": Chip("H100 SXM", 84942979072.0, {"bfloat16": 989e12, "float32": 66.9e12}, 3352e9, 450e9),
}


@dataclass(frozen=True)
class Topology:
    """Devices of one kind: kind is a key of CHIPS or "cpu", sizes as the flag gives them."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.sizes))}"


def parse(text: str) -> Topology:
    """The topology that a flag names.

    Raises:
      ValueError: it names none.
    """
    kind, _, sizes = text.partition(":")
    known = (*CHIPS, "cpu")
    if kind not in known or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,3}){0,2}", sizes):
        raise ValueError(f"--topology={text!r} is none: write KIND:SIZE, as in {EXAMPLES}")
    topology = Topology(kind, tuple(map(int, sizes.split("x"))))
    dims = {"v5e": 2, "v6e": 2, "v5p": 3}.get(kind, 1)
    if len(topology.sizes) != dims:
        example = next(e for e in EXAMPLES.replace(" or", ",").split(", ") if e.startswith(kind))
        raise ValueError(f"--topology={text!r}: {kind} has {dims} size{'s' * (dims > 1)}, as in {example}")
    return topology


def chip_of(topology: Topology) -> Chip:
    """The chip, with the share of its memory that jax takes on a GPU; a CPU device has its share of the host's."""
    if topology.kind == "cpu":
        return Chip("simulated CPU device", capacity.host_memory() / topology.count, {}, 0.0, 0.0)
    chip = CHIPS[topology.kind]
    if topology.kind != "h100":
        return chip
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    return Chip(chip.name, chip.memory * share, chip.flops, chip.bandwidth, chip.links)


def simulate(topology: Topology) -> None:
    """Keeps jax to the host's CPU, with as many simulated devices as a cpu topology has; before its backend starts.

    Raises:
      ValueError: the backend runs already, with fewer devices.
    """
    with contextlib.suppress(RuntimeError):  # the backend has started: its devices are counted below
        jax.config.update("jax_platforms", "cpu")
        if topology.kind == "cpu":
            jax.config.update("jax_num_cpu_devices", topology.count)
    if topology.kind == "cpu" and len(jax.devices()) < topology.count:
        raise ValueError(
            f"--topology={topology.name}: jax has {len(jax.devices())} CPU devices here; unset "
            "--xla_force_host_platform_device_count in XLA_FLAGS, or set it to as many"
        )


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for; only those of a cpu topology can run anything.

    Raises:
      ValueError: the compiler for them is not installed, or it knows no such topology.
    """
    if topology.kind == "cpu":
        return jax.devices()[: topology.count]
    missing = missing_compiler(topology)
    if missing:
        raise ValueError(missing)
    from jax.experimental import topologies

    try:
        with _silent():
            description = _description(topologies, topology)
    except Exception as error:  # whatever a plugin raises
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"--topology={topology.name}: its compiler does not know it ({reason}); try one of {EXAMPLES}"
        ) from error
    return list(description.devices)


def _description(topologies: Any, topology: Topology) -> Any:
    if topology.kind != "h100":
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc(topology.name, "tpu")
    target = (pathlib.Path(__file__).with_name("targets") / "h100.txtpb").read_text()
    shape = f"1x1x{topology.count}"
    return topologies.get_topology_desc("h100", "cuda", topology=shape, target_config=target)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discards stderr: a compiler warns there that the machine has no such device, which is expected here."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def missing_compiler(topology: Topology) -> str:
    """What to install before a topology can be compiled for, in one line; empty where nothing is missing."""
    version = jax.__version__
    if topology.kind == "h100" and importlib.util.find_spec("jax_cuda12_plugin") is None:
        return (
            f"--topology={topology.name} needs XLA's compiler for NVIDIA GPUs (but no GPU, and no driver): "
            f"pip install --no-deps jax-cuda12-pjrt=={version} jax-cuda12-plugin=={version}"
        )
    if topology.kind not in ("h100", "cpu") and importlib.util.find_spec("libtpu") is None:
        return (
            f"--topology={topology.name} needs XLA's compiler for TPUs (but no TPU): pip install 'jax[tpu]=={version}'"
        )
    return ""
