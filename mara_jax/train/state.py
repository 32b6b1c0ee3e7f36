"""What a step reads and writes, as pytrees."""

from typing import Any, NamedTuple

import jax
from flax import struct

from mara_jax.config import LanguageRun
from mara_jax.core import method_rules
from mara_jax.core.scored import Numbers
from mara_jax.policies.packing import Packing
from mara_jax.sampling.logprobs import Hidden


@struct.dataclass
class State:
    """Everything an update changes.

    step: int32 scalar, of rollouts; params and opt_state: pytrees; log_z: [number of prompts] log Z of each prompt
    (nats), -inf before its first visit, where the objective learns it, else None; rewards: [steps, completions of a
    step] those of the steps before, the newest last, -inf for none, where the threshold is a percentile of them, else
    None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    log_z: jax.Array | None = None
    rewards: jax.Array | None = None


class Remembered(NamedTuple):
    """Shapes of what a state holds beside parameters and their moments: `log_z`, a number of prompts, and `rewards`, a
    number of steps and one of completions. 0 for what a run does not have."""

    log_z: int = 0
    rewards: tuple[int, int] = (0, 0)


NOTHING = Remembered()


def remembered(run: LanguageRun, prompts: int) -> Remembered:
    """What the states of a run hold beside parameters and their moments; prompts: how many the task has."""
    algorithm, sizes = run.algorithm, run.rollout
    log_z = prompts if method_rules.learns_log_z(algorithm) else 0
    if not method_rules.moves_threshold(algorithm):
        return Remembered(log_z)
    return Remembered(log_z, (algorithm.threshold_window, sizes.prompts_per_step * sizes.group_size))


@struct.dataclass
class Batch:
    """Scored completions of p prompts, g each, right-padded to t tokens.

    prompt_tokens [p, s], prompt_lengths [p], tokens [p, g, t], lengths [p, g] (end token included),
    reward [p, g] (reward units), answer [p, g] (index within its prompt, -1 for none), prompt_ids [p] (numbers of the
    prompts in the data), ref_hidden (the reference's hidden states, whose logits are made beside the policy's), packing
    (how they and the policy's lie in packed sequences; None: padded), sampler_logp [p, g, t] (what the sampler recorded
    of each token, nats; None where no weights are asked for), counted [p, g] (0 for a completion that is left out of
    the update; None where all count), ref_reward and ref_answer [p, n] (scores of n samples of
    the reference under each prompt, answers by the same indices; None where the method reads none), log_mass [p, a]
    (log-masses of answers in nats, where the task lists their strings; else None), replayed (how many of each group's
    completions, the last ones, are of earlier steps; static).
    """

    prompt_tokens: jax.Array
    prompt_lengths: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    reward: jax.Array
    answer: jax.Array
    prompt_ids: jax.Array
    ref_hidden: Hidden
    packing: Packing | None = None
    sampler_logp: jax.Array | None = None
    counted: jax.Array | None = None
    ref_reward: jax.Array | None = None
    ref_answer: jax.Array | None = None
    log_mass: jax.Array | None = None
    replayed: int = struct.field(pytree_node=False, default=0)


class BySampler(NamedTuple):
    """One value for the policy's samples, one for the reference policy's; None where the estimator reads none of these.

    (Only "reference_samples" does: its likelihood term is an expectation under the reference policy.)
    """

    policy: Any
    reference: Any = None


Hyperparameters = Numbers
