"""What a step reads and writes, as pytrees."""

from typing import Any

import jax
from flax import struct

from mara_jax.policies.packing import Packing
from mara_jax.sampling.logprobs import Hidden


@struct.dataclass
class State:
    """Everything an update changes. step: int32 scalar, of rollouts; params and opt_state: pytrees."""

    step: jax.Array
    params: Any
    opt_state: Any


@struct.dataclass
class Batch:
    """Scored completions of p prompts, g each, right-padded to t tokens.

    prompt_tokens [p, s], prompt_lengths [p], tokens [p, g, t], lengths [p, g] (end token included),
    reward [p, g] (reward units), answer [p, g] (class index, -1 for none), log_mass [p, a] (log Z or log M of each
    answer under the reference), ref_hidden (the reference's hidden states, whose logits are made beside the
    policy's), packing (how they and the policy's lie in streams; None: padded), sampler_logp [p, g, t] (what the
    sampler recorded of each token, nats; None where no weights are asked for).
    """

    prompt_tokens: jax.Array
    prompt_lengths: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    reward: jax.Array
    answer: jax.Array
    log_mass: jax.Array
    ref_hidden: Hidden
    packing: Packing | None = None
    sampler_logp: jax.Array | None = None
