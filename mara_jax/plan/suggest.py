"""A mesh for a run, from arithmetic alone: of all that the model allows, the fastest that has room."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from mara_jax import config
from mara_jax.plan import work
from mara_jax.plan.abstract import Sizes
from mara_jax.plan.chips import Chip
from mara_jax.policies import lora, parameters
from mara_jax.policies.ops.select import uses_kernels
from mara_jax.policies.parameters import Architecture

# Assumed, not measured: seconds that the smallest all-reduce over a few neighbours takes. A rollout makes two of them
# in each layer at each token.
LATENCY = 5e-6


class MeshShape(NamedTuple):
    """Devices along each mesh axis."""

    data: int
    fsdp: int
    tensor: int

    @property
    def row_shards(self) -> int:
        """Shards that the rows of a batch are cut into."""
        return self.data * self.fsdp

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor


class LocalBatch(NamedTuple):
    """What one device holds of an update's batch: completions, and token positions including those of their prompts."""

    rows: float
    positions: float


class Candidate(NamedTuple):
    """A mesh, the bytes that a device is estimated to need with it, and the seconds of a step (0: peaks unknown)."""

    data: int
    fsdp: int
    tensor: int
    bytes: float
    seconds: float

    @property
    def flags(self) -> str:
        return f"--config.mesh.data={self.data} --config.mesh.fsdp={self.fsdp} --config.mesh.tensor={self.tensor}"


def best(
    run: config.LanguageRun,
    arch: Architecture,
    sizes: Sizes,
    chip: Chip,
    devices: int,
    reward_arch: Architecture | None = None,
) -> Candidate | None:
    """The mesh to use; where none has room, the one that needs least; None where no mesh divides the run's rows.

    reward_arch: of the reward model that scores completions, whose parameters a mesh must divide, too.
    """
    candidates = [
        estimate(run, arch, sizes, chip, mesh, reward_arch)
        for mesh in meshes(run, arch, sizes, devices)
        if reward_arch is None or _divides(reward_arch, mesh)
    ]
    if not candidates:
        return None
    fitting = [candidate for candidate in candidates if candidate.bytes <= chip.memory]
    if not fitting:
        return min(candidates, key=lambda candidate: candidate.bytes)
    # Among equally fast meshes, data parallelism is preferred to FSDP, and FSDP to tensor parallelism.
    return min(fitting, key=lambda candidate: (candidate.seconds, candidate.tensor, candidate.fsdp))


def meshes(run: config.LanguageRun, arch: Architecture, sizes: Sizes, devices: int) -> Iterator[MeshShape]:
    """Every mesh that divides the model and the rows of a step without overrides of the table."""
    samples = sizes.group // run.optimiser.micro_batches
    for tensor in _divisors(math.gcd(devices, math.gcd(arch.kv_heads, math.gcd(arch.mlp, arch.vocab_size)))):
        rows = devices // tensor
        if not any(sizes.prompts % cut == 0 and samples % (rows // cut) == 0 for cut in _divisors(rows)):
            continue
        for fsdp in _divisors(math.gcd(rows, arch.embed)):
            if _rows_divide(sizes.prompts, samples, rows // fsdp, fsdp):
                yield MeshShape(rows // fsdp, fsdp, tensor)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _divides(arch: Architecture, mesh: MeshShape) -> bool:
    """Whether a mesh divides the parameters of a model."""
    whole = math.gcd(math.gcd(arch.heads, arch.kv_heads), math.gcd(arch.mlp, arch.vocab_size))
    return whole % mesh.tensor == 0 and arch.embed % mesh.fsdp == 0


def _rows_divide(prompts: int, samples: int, data: int, fsdp: int) -> bool:
    """As `parallel.sharding.row_axes`: whole mesh axes divide the prompts, the others the samples."""
    cuts = ((data * fsdp, 1), (data, fsdp), (1, data * fsdp))
    return any(prompts % outer == 0 and samples % inner == 0 for outer, inner in cuts)


def estimate(
    run: config.LanguageRun,
    arch: Architecture,
    sizes: Sizes,
    chip: Chip,
    mesh: MeshShape,
    reward_arch: Architecture | None = None,
) -> Candidate:
    """A mesh with the bytes and seconds that it is estimated to take."""
    width = jnp.dtype(arch.compute_dtype).itemsize
    count, batch, (_, fsdp, tensor) = parameters.count(arch), _local_batch(sizes, mesh), mesh
    # Held throughout: what is trained, with two moments, and the reference. An update adds gradients, and the kernels
    # in the compute dtype.
    trained = lora.count(arch)
    held = (3 * 4 * trained + min(width, 4) * count) / (fsdp * tensor)
    if reward_arch is not None:
        held += parameters.count(reward_arch) * min(jnp.dtype(reward_arch.compute_dtype).itemsize, 4) / (fsdp * tensor)
    slots = 2 * arch.layers * arch.kv_heads / tensor * arch.head_dim * width
    rollout = slots * sizes.rows / mesh.row_shards * sizes.new_tokens + (count * width / tensor if fsdp > 1 else 0)
    gradients = (4 * trained + width * count) / (fsdp * tensor)
    update = gradients + _head(arch, fsdp, tensor) + _activations(run, arch, sizes, batch, tensor)
    seconds = _seconds(arch, sizes, chip, mesh) if arch.compute_dtype in chip.flops else 0
    if reward_arch is not None and reward_arch.compute_dtype in chip.flops:
        read = sizes.prompts * sizes.group * (sizes.prompt_tokens + sizes.new_tokens)
        seconds += 2 * work.layer_parameters(reward_arch) * read / mesh.devices / chip.flops[reward_arch.compute_dtype]
    return Candidate(*mesh, held + max(rollout, update), seconds)


def _local_batch(sizes: Sizes, mesh: MeshShape) -> LocalBatch:
    rows = sizes.prompts * sizes.group / mesh.row_shards
    prompt_positions = sizes.prompts * sizes.prompt_tokens / min(sizes.prompts, mesh.row_shards)
    return LocalBatch(rows, rows * (sizes.new_tokens - 1) + prompt_positions)


def _head(arch: Architecture, fsdp: int, tensor: int) -> float:
    """Bytes of arrays [v, d] in an update, as compiled programs have them.

    With FSDP: two gradients of the embedding, one from its lookup and one from the head. Without: these and a copy of
    each, and the heads of policy and reference in the compute dtype.
    """
    size, width = arch.vocab_size * arch.embed / (fsdp * tensor), jnp.dtype(arch.compute_dtype).itemsize
    gradients = 0 if arch.lora else 2 * 4  # an adapter leaves the embedding frozen
    return size * (gradients if fsdp > 1 else 2 * gradients + 2 * width)


def _activations(run, arch: Architecture, sizes: Sizes, batch: LocalBatch, tensor: int) -> float:
    """Bytes of activations saved for the backward pass.

    These are the activations of every layer, or with remat=layer those of one layer and the inputs of all; and the
    attention scores of one layer (of all without remat), unless fused kernels keep scores out of memory.
    """
    rows, positions = batch
    width = jnp.dtype(arch.compute_dtype).itemsize
    part = 1 / run.optimiser.micro_batches
    heads = arch.heads * arch.head_dim + 2 * arch.kv_heads * arch.head_dim
    matmuls = (2 * arch.embed + (2 * heads + 3 * arch.mlp) / tensor) * width
    wide = 4 * positions * arch.mlp / tensor  # the gate's activation or its derivative, in float32
    keys = 0 if uses_kernels(arch) else sizes.new_tokens + sizes.prompt_tokens
    scores = rows * arch.heads / tensor * (sizes.new_tokens - 1) * keys * 4
    kept = {"layer": 1, "elementwise": arch.layers, "none": arch.layers}[arch.remat]
    times = 2 if arch.remat == "none" else 1  # elementwise results beside those of matmuls
    of_layers = positions * (arch.layers * arch.embed * width + kept * times * matmuls)
    return part * (of_layers + wide + scores * (2 + (arch.layers if arch.remat == "none" else 1)))


def _seconds(arch: Architecture, sizes: Sizes, chip: Chip, mesh: MeshShape) -> float:
    """The least seconds of a step: each phase takes as long as compute, memory or links, whichever bounds it."""
    (data, fsdp, tensor), (rows, positions) = mesh, _local_batch(sizes, mesh)
    width, count = jnp.dtype(arch.compute_dtype).itemsize, parameters.count(arch)
    trained = lora.count(arch)
    lengths = [[sizes.new_tokens] * sizes.group] * sizes.prompts
    flops = work.least(arch, [sizes.prompt_tokens] * sizes.prompts, lengths)
    peak, weights, steps = chip.flops[arch.compute_dtype], count * width / tensor, sizes.steps
    gathered = weights * (fsdp - 1) / fsdp
    reduced = 4 * trained / tensor * (fsdp - 1) / fsdp + 2 * 4 * trained / (fsdp * tensor) * (data - 1) / data
    # Two all-reduces over the tensor axis in each layer, of every position.
    sums = 2 * arch.layers * arch.embed * width * 2 * (tensor - 1) / tensor
    token_cache = 2 * arch.layers * arch.kv_heads / tensor * arch.head_dim * width
    cache = token_cache * sizes.rows / mesh.row_shards * sizes.new_tokens / 2  # on average half as long as at the end
    remat = 1 if arch.remat == "layer" else 0
    waiting = 2 * arch.layers * steps * LATENCY if tensor > 1 else 0.0
    rollout = (flops.rollout, steps * (weights + cache), gathered + sums * rows * (sizes.new_tokens - 1))
    reference = (flops.reference, weights, gathered + sums * positions)
    # Frozen kernels have no gradient: two thirds of the work, and remat adds the forward pass.
    update_flops = flops.update * ((2 if arch.lora else 3) + remat) / 3
    update = (update_flops, (2 + remat) * weights, (2 + remat) * (gathered + sums * positions) + reduced)
    return waiting + sum(
        max(computed / mesh.devices / peak, moved / chip.bandwidth, sent / chip.links)
        for computed, moved, sent in (rollout, reference, update)
    )


def with_mesh(run: config.LanguageRun, mesh: Candidate) -> config.LanguageRun:
    """The run on another mesh."""
    axes = dataclasses.replace(run.mesh, data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor)
    return dataclasses.replace(run, mesh=axes)
