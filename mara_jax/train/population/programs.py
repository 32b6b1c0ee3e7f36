"""The programs of a step for several policies at once: those of a single run, under vmap.

What the members of a population share goes in once: the reference policy, and with adapters the kernels beside them.
Everything else has a leading axis of members k.
"""

import functools
from typing import Any

import jax

from mara_jax.policies import lora
from mara_jax.policies.packing import Packing
from mara_jax.policies.parameters import Architecture
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import step
from mara_jax.train.state import BySampler, Hyperparameters, State

MEMBERS = "members"  # the name of the vmapped axis


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

    def of_member(trained: Any, prompts: rollout.Prompts, key: jax.Array) -> rollout.Drawn:
        params = base if trained is None else lora.attached(arch, base, trained)
        return rollout.generate(arch, params, prompts, key, settings)

    return jax.vmap(of_member, axis_name=MEMBERS)(trained_k, prompts_k, key_k)


@functools.partial(jax.jit, static_argnames=("arch", "parts"))
def policy_hidden(
    arch: Architecture, base: Any, trained_k: Any, tokens_k: tuple, packing_k: Packing | None, parts: int
) -> logprobs.Hidden:
    """As `logprobs.reference_hidden`, of each member's policy at its completions.

    tokens_k: prompt_tokens [k, p, s], prompt_lengths [k, p], tokens [k, p, g, t].
    """

    def of_member(trained: Any, tokens: tuple, packing: Packing | None) -> logprobs.Hidden:
        return logprobs.reference_hidden(arch, lora.attached(arch, base, trained), *tokens, packing, parts)

    return jax.vmap(of_member)(trained_k, tokens_k, packing_k)


@functools.partial(jax.jit, static_argnames=("arch", "parts", "one_prompt"))
def reference_hidden(
    arch: Architecture, base: Any, tokens_k: tuple, packing_k: Packing | None, parts: int, one_prompt: bool
) -> logprobs.Hidden:
    """As `logprobs.reference_hidden`, of the shared reference policy; arguments as of `policy_hidden`.

    one_prompt: whether all members have the same prompts, which are then computed once.
    """
    prompt_tokens, prompt_lengths, completions = tokens_k
    axis = None if one_prompt else 0
    prompts = (prompt_tokens[0], prompt_lengths[0]) if one_prompt else (prompt_tokens, prompt_lengths)

    def of_member(prompts: tuple, tokens: jax.Array, packing: Packing | None) -> logprobs.Hidden:
        return logprobs.reference_hidden(arch, base, *prompts, tokens, packing, parts)

    return jax.vmap(of_member, in_axes=(axis, 0, 0))(prompts, completions, packing_k)


@functools.partial(jax.jit, static_argnames=("choices",), donate_argnames=("states",))
def update(
    states: State, ref_params: Any, batches: BySampler, hyper: Hyperparameters, choices: step.Choices
) -> tuple[State, dict[str, jax.Array]]:
    """As `step.update` for each member; the old states' buffers are donated."""

    def of_member(state: State, batches: BySampler, hyper: Hyperparameters) -> tuple[State, dict[str, jax.Array]]:
        return step.update(state, ref_params, batches, hyper, choices)

    return jax.vmap(of_member)(states, batches, hyper)
