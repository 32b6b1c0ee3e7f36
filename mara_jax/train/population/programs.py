"""The programs of a step for several policies at once: those of a single run, under vmap.

What the members of a population share goes in once: the reference policy, and with adapters the kernels beside them.
Everything else has a leading axis of members k, which the devices of the mesh axis "data" divide among them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mara_jax.parallel import sharding
from mara_jax.policies import lora
from mara_jax.policies.packing import Packing
from mara_jax.policies.parameters import Architecture
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import step
from mara_jax.train.state import BySampler, Hyperparameters, State

MEMBERS = "members"  # the name of the vmapped axis


def member_sharding(members: int) -> NamedSharding | None:
    """Of arrays [k, ...] in the layout in use: each device has as many members, or all where these do not divide.

    None where there is no layout.
    """
    layout = sharding.current()
    if layout is None:
        return None
    divides = members % sharding.shard_count("members") == 0
    return sharding.named_sharding(layout, ("members" if divides else None,))


def over_members(function: Callable[[Any, Any], Any], shared: Any, own_k: Any) -> Any:
    """function(shared, own) of every member; the results have a leading axis of members.

    The devices compute apart from one another: none waits until the completions of another's members have ended.

    Args:
      own_k: pytree of arrays [k, ...].
    """

    def part(shared: Any, own_k: Any) -> Any:
        with sharding.without_layout():  # a member lies on one device
            return jax.vmap(functools.partial(function, shared), axis_name=MEMBERS)(own_k)

    placed = member_sharding(len(jax.tree.leaves(own_k)[0]))
    if placed is None:
        return part(shared, own_k)
    specs = (PartitionSpec(), placed.spec)
    return jax.shard_map(part, mesh=placed.mesh, in_specs=specs, out_specs=placed.spec, check_vma=False)(shared, own_k)


@functools.partial(jax.jit, static_argnames=("arch", "settings"))
def generate(
    arch: Architecture,
    base: Any,
    trained_k: Any,
    prompts_k: rollout.Prompts,
    key_k: jax.Array,
    settings: rollout.Settings,
) -> rollout.Drawn:
    """As `rollout.generate` for each member.

    Args:
      base: parameters that all share; trained_k: what each trains, or None to sample from the shared ones.
    """
    settings = settings._replace(axis_name=MEMBERS)

    def of_member(base: Any, own: tuple) -> rollout.Drawn:
        trained, prompts, key = own
        params = base if trained is None else lora.attached(arch, base, trained)
        return rollout.generate(arch, params, prompts, key, settings)

    return over_members(of_member, base, (trained_k, prompts_k, key_k))


@functools.partial(jax.jit, static_argnames=("arch", "parts"))
def policy_hidden(
    arch: Architecture, base: Any, trained_k: Any, tokens_k: tuple, packing_k: Packing | None, parts: int
) -> logprobs.Hidden:
    """As `logprobs.reference_hidden`, of each member's policy at its completions.

    tokens_k: prompt_tokens [k, p, s], prompt_lengths [k, p], tokens [k, p, g, t].
    """

    def of_member(base: Any, own: tuple) -> logprobs.Hidden:
        trained, tokens, packing = own
        return logprobs.reference_hidden(arch, lora.attached(arch, base, trained), *tokens, packing, parts)

    return over_members(of_member, base, (trained_k, tokens_k, packing_k))


@functools.partial(jax.jit, static_argnames=("arch", "parts", "one_prompt"))
def reference_hidden(
    arch: Architecture, base: Any, tokens_k: tuple, packing_k: Packing | None, parts: int, one_prompt: bool
) -> logprobs.Hidden:
    """As `logprobs.reference_hidden`, of the shared reference policy; arguments as of `policy_hidden`.

    one_prompt: whether all members have the same prompts, which are then computed once.
    """
    *prompts_k, completions = tokens_k
    same = [array[0] for array in prompts_k] if one_prompt else None

    def of_member(shared: tuple, own: tuple) -> logprobs.Hidden:
        (base, same), (prompts, tokens, packing) = shared, own
        return logprobs.reference_hidden(arch, base, *(same or prompts), tokens, packing, parts)

    return over_members(of_member, (base, same), (None if one_prompt else prompts_k, completions, packing_k))


@functools.partial(jax.jit, static_argnames=("choices",), donate_argnames=("states",))
def update(
    states: State,
    ref_params: Any,
    batches: BySampler,
    hyper: Hyperparameters,
    rate_k: jax.Array,
    choices: step.Choices,
) -> tuple[State, dict[str, jax.Array]]:
    """As `step.update` for each member, whose learning rate is rate_k [k] times that of `choices.tx`; the old states'
    buffers are donated."""

    def of_member(ref_params: Any, own: tuple) -> tuple[State, dict[str, jax.Array]]:
        state, batches, hyper, rate = own
        return step.update(state, ref_params, batches, hyper, choices, rate)

    return over_members(of_member, ref_params, (states, batches, hyper, rate_k))
