"""What a step reads and writes, as pytrees."""

from typing import Any, NamedTuple

import jax
from flax import struct

from mara_jax.core.scored import Numbers
from mara_jax.policies.packing import Packing
from mara_jax.sampling.logprobs import Hidden


@struct.dataclass
class State:
    """Everything an update changes.

    step: int32 scalar, of rollouts; params and opt_state: pytrees; log_z: [number of prompts] log Z of each prompt
    (nats), -inf before its first visit, where the objective learns it, else None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    log_z: jax.Array | None = None


@struct.dataclass
class Batch:
    """Scored completions of p prompts, g each, right-padded to t tokens.

    prompt_tokens [p, s], prompt_lengths [p], tokens [p, g, t], lengths [p, g] (end token included),
    reward [p, g] (reward units), answer [p, g] (index within its prompt, -1 for none), prompt_ids [p] (numbers of the
    prompts in the data), ref_hidden (the reference's hidden states, whose logits are made beside the policy's), packing
    (how they and the policy's lie in packed sequences; None: padded), sampler_logp [p, g, t] (what the sampler recorded
    of each token, nats; None where no weights are asked for), counted [p, g] (0 for a completion that is left out of
    the update; None where all count), ref_reward and ref_answer [p, n] (scores of n samples of
    the reference under each prompt, answers by the same indices; None where the method reads none).
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


class BySampler(NamedTuple):
    """One value for the policy's samples, one for the reference policy's; None where the estimator reads none of these.

    (Only "reference_samples" does: its likelihood term is an expectation under the reference policy.)
    """

    policy: Any
    reference: Any = None


Hyperparameters = Numbers
