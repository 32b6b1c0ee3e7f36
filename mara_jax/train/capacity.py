"""What a run must hold in memory whatever the compiler does: its models, moments and cache, counted from shapes."""

import contextlib
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.config import LanguageRun, is_population
from mara_jax.parallel import sharding
from mara_jax.policies.parameters import Architecture
from mara_jax.train import optim, placement

GIB = 2**30
MARGIN = 0.6


class Held(NamedTuple):
    """Bytes on one device: of the policy's parameters, its frozen reference's, the optimiser's state, the cache, and a
    reward model's parameters."""

    parameters: int
    reference: int
    optimiser: int
    cache: int
    reward_model: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def held(run: LanguageRun, arch: Architecture, reward_arch: Architecture | None = None) -> Held:
    """What each device of the layout in use holds during a rollout, at the least.

    Args:
      arch: of the policy; reward_arch: of the reward model that scores its completions, None where there is none.
    """
    state = placement.abstract(arch, optim.make(run.optimiser))
    parameters = bytes_of(state.params)
    reference = bytes_of(placement.abstract_reference(arch))
    scoring = 0 if reward_arch is None else bytes_of(placement.abstract_reference(reward_arch))
    return Held(parameters, reference, bytes_of(state.opt_state), cache_bytes(run, arch), scoring)


def bytes_of(tree: Any) -> int:
    """Bytes of arrays, or of their shapes, on one device."""
    return sum(_bytes_of_leaf(leaf) for leaf in jax.tree.leaves(tree))


def _bytes_of_leaf(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def cache_bytes(run: LanguageRun, arch: Architecture) -> int:
    """Keys and values of the completions that are decoded at once, on one device."""
    rows = run.rollout.prompts_per_step * run.rollout.group_size
    rows = min(run.rollout.slots or rows, rows)  # decoded at once
    cut = 1
    for logical, count in (("rows", rows), ("kv_heads", arch.kv_heads)):
        parts = sharding.shard_count(logical)
        cut *= parts if count % parts == 0 else 1
    slots = rows * arch.kv_heads * run.rollout.max_new_tokens // cut
    return 2 * arch.layers * slots * arch.head_dim * jnp.dtype(arch.compute_dtype).itemsize


def members_at_once(run: LanguageRun, arch: Architecture, limit: float, reward_arch: Architecture | None = None) -> int:
    """How many members of a population have room side by side, at least one a device; an estimate.

    They share the reference policy and a reward model. Each has its parameters, gradients and moments twice while they
    are updated, its cache, and what the backward pass reads: of every token and layer about eight vectors of the
    model's width and three of the feed-forward's. A MARGIN of the memory is left to what XLA adds.

    Args:
      arch: of the policy, with its adapter if there is one; limit: bytes of each device of the layout in use;
        reward_arch: as of `held`.
    """
    sizes = run.rollout
    with sharding.without_layout():  # a member lies on one device
        need = held(run, arch, reward_arch)
    tokens = sizes.prompts_per_step * sizes.group_size * sizes.max_new_tokens // run.optimiser.micro_batches
    saved = 1 if run.policy.remat == "layer" else arch.layers
    activations = tokens * saved * (8 * arch.embed + 3 * arch.mlp) * jnp.dtype(arch.compute_dtype).itemsize
    own = 3 * need.parameters + 2 * need.optimiser + need.cache + activations
    return max(1, int((MARGIN * limit - need.reference - need.reward_model) // own)) * sharding.shard_count("members")


def wave_sizes(members: int, at_once: int) -> list[int]:
    """How many members of a population are side by side, wave after wave, on the devices of the layout in use.

    As many for each device; those that are left when no device can have one more are trained last, each wave of them by
    all devices alike, so no more at once than a device has otherwise.

    Args:
      members: whose update is one program; at_once: at most, on all devices together, but at least one for each.
    """
    devices = sharding.shard_count("members")
    each = max(1, at_once // devices)
    left = members % devices
    parts = ((members - left, each * devices), (left, each))
    return [min(most, count - first) for count, most in parts for first in range(0, count, most)]


def check(
    run: LanguageRun, arch: Architecture, limit: float, devices: int = 1, reward_arch: Architecture | None = None
) -> None:
    """Refuses a run that cannot have room.

    Args:
      arch: of its policy; reward_arch: as of `held`.
      limit: bytes there are, for `devices` devices of the layout in use together.

    Raises:
      ValueError: one line.
    """
    with sharding.without_layout() if is_population(run) else contextlib.nullcontext():
        need = held(run, arch, reward_arch)  # a population's member lies whole on a device
    if need.total * devices <= limit:
        return
    where = "a device" if devices == 1 else f"the host of {devices} devices"
    sizes = {name.replace("_", " "): size for name, size in need._asdict().items() if size or name != "reward_model"}
    parts = ", ".join(f"{name} {_gib(size * devices)}" for name, size in sizes.items())
    raise ValueError(
        f"it does not fit: {where} must hold {_gib(need.total * devices)} ({parts}) and has {_gib(limit)}: "
        f"{cure(need)}; python -m mara_jax.plan tells what a run needs"
    )


def cure(need: Held) -> str:
    """What helps against the largest part."""
    if need.cache > need.total - need.cache:
        return "lower rollout.prompts_per_step, rollout.group_size or rollout.max_new_tokens, or use more devices"
    if need.reward_model > need.total - need.reward_model:
        return "cut it over more devices with mesh.fsdp, set task.reward_model_dtype=bfloat16, or choose a smaller one"
    return "cut it over more devices with mesh.fsdp, or choose a smaller policy.weights"


def limit_here() -> tuple[float, int]:
    """Bytes there are, and how many devices of the layout in use share them: an accelerator's own, or the host's."""
    layout = sharding.current()
    devices = [jax.local_devices()[0]] if layout is None else list(layout.mesh.local_devices)
    stats = devices[0].memory_stats()
    if stats and stats.get("bytes_limit"):
        return float(stats["bytes_limit"]), 1
    return host_memory(), len(devices)


def host_memory() -> float:
    """Bytes this process may use: the machine's, or its control group's where that is less."""
    sizes = [math.inf]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            with open(f"/sys/fs/cgroup/{name}") as file:
                sizes.append(float(file.read()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(sizes)


def _gib(size: float) -> str:
    return f"{size / GIB:,.3g} GiB"
