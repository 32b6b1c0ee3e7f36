"""The programs of a training step, each a jitted function with the arguments of one call.

The loop calls them on arrays, `bench` counts their FLOPs, and `plan` compiles them from shapes alone: every array here
may be a jax.ShapeDtypeStruct.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from mara_jax.config import Algorithm, LanguageRun
from mara_jax.core import method_rules
from mara_jax.policies.packing import Packing
from mara_jax.policies.parameters import Architecture
from mara_jax.policies.policy import Policy
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import step
from mara_jax.train.state import Batch, BySampler, Hyperparameters, State


class Program(NamedTuple):
    """A jitted function and the arguments of one call."""

    function: Any
    args: tuple

    def __call__(self) -> Any:
        """Dispatches the call."""
        return self.function(*self.args)

    def compile(self) -> Any:
        """The program as XLA compiles it for the devices of the layout in use."""
        return self.function.lower(*self.args).compile()


def rollout_program(run: LanguageRun, policy: Policy, params: Any, prompts: rollout.Prompts, key: jax.Array) -> Program:
    """Samples a group of completions of each prompt from the policy with these params."""
    sizes = run.rollout
    settings = rollout.Settings(sizes.group_size, sizes.max_new_tokens, policy.eos_ids, policy.pad_id, sizes.slots)
    return Program(rollout.generate, (policy.architecture, params, prompts, key, settings))


def reference_program(
    run: LanguageRun,
    arch: Architecture,
    ref_params: Any,
    completions: rollout.Rollout | Batch,
    packing: Packing | None,
) -> Program:
    """The reference policy's hidden states at completions, from which the update makes its log-probs."""
    tokens = (completions.prompt_tokens, completions.prompt_lengths, completions.tokens)
    return Program(logprobs.reference_hidden, (arch, ref_params, *tokens, packing, run.optimiser.micro_batches))


def update_program(
    run: LanguageRun,
    arch: Architecture,
    tx: optax.GradientTransformation,
    state: State,
    ref_params: Any,
    batches: BySampler,
) -> Program:
    """The reward transform, the objective's gradient and the optimiser; it donates the state's buffers."""
    return Program(step.update, (state, ref_params, batches, hyperparameters(run), static_choices(run, arch, tx)))


def hyperparameters(run: LanguageRun) -> Hyperparameters:
    """What an update of the run takes as arguments, so that another value is no other program."""
    algorithm = run.algorithm
    return Hyperparameters(*(np.float32(x) for x in (algorithm.beta, algorithm.threshold, algorithm.eta)))


def static_choices(run: LanguageRun, arch: Architecture, tx: optax.GradientTransformation) -> step.Choices:
    """What is static in an update of the run."""
    algorithm, optimiser = static_algorithm(run), run.optimiser
    return step.Choices(arch, algorithm, tx, optimiser.micro_batches, optimiser.updates, run.guard == "skip")


def static_algorithm(run: LanguageRun) -> Algorithm:
    """The run's algorithm without what `hyperparameters` has: runs whose algorithms are then equal share a program."""
    return dataclasses.replace(method_rules.resolved(run.algorithm), beta=1.0, threshold=0.0, eta=1.0)
