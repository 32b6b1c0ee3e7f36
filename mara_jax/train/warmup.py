"""Supervised steps on a task's demonstrations: how a base policy learns the format before the run."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mara_jax.parallel import hosts
from mara_jax.policies import encoding
from mara_jax.policies.policy import Policy
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import finite, placement
from mara_jax.train.state import State


def demonstration_batch(
    policy: Policy, pairs: Sequence[tuple[list[int], str]], width: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of (prompt ids, completion text) pairs, each completion closed by the token `end`.

    Equal prompts share one row, so that the prompt is computed once.

    Returns:
      prompt_tokens [p, s], prompt_lengths [p], tokens [p, g, width], lengths [p, g].
    """
    rows = []
    for _, text in pairs:
        ids = [*encoding.encode_completion(policy.tokenizer, text), end]
        rows.append(ids)
    prompts = [prompt for prompt, _ in pairs]
    shared = all(prompt == prompts[0] for prompt in prompts)
    prompt_tokens_ps, prompt_lengths_p = rollout.pad_prompts(prompts[:1] if shared else prompts, policy.pad_id)
    tokens_bt = np.full((len(rows), width), policy.pad_id, np.int32)
    for row, ids in zip(tokens_bt, rows, strict=True):
        row[: len(ids)] = ids
    p = len(prompt_lengths_p)
    lengths_b = np.array([len(ids) for ids in rows], np.int32)
    return prompt_tokens_ps, prompt_lengths_p, tokens_bt.reshape(p, -1, width), lengths_b.reshape(p, -1)


def placed(prompt_tokens_ps, prompt_lengths_p, tokens_pgt, lengths_pg) -> tuple[jax.Array, ...]:
    """A batch of demonstrations on the devices of the layout in use."""
    samples = lengths_pg.shape[1]
    return (
        hosts.shard_prompts(prompt_tokens_ps, samples),
        hosts.shard_prompts(prompt_lengths_p, samples),
        hosts.shard_groups(tokens_pgt),
        hosts.shard_groups(lengths_pg),
    )


def check(step: int, loss: float, state: State | None, rate: float) -> None:
    """Refuses to go on after a loss that is not finite, and to end with such a state.

    Args:
      step: from 1; loss: of it (nats a token); state: after the last step, else None; rate: the learning rate.

    Raises:
      ValueError: one line.
    """
    name = "the loss" if not math.isfinite(loss) else state and finite.nonfinite_array(state)
    if name:
        hosts.raise_as_one(
            ValueError(
                f"warm-up step {step}: {name} is not finite: lower warmup.learning_rate={rate}, or look whether "
                "policy.weights are whole"
            )
        )


@functools.partial(jax.jit, static_argnames=("arch", "tx"), donate_argnames=("state",))
def supervised_update(
    state: State,
    prompt_tokens_ps,
    prompt_lengths_p,
    tokens_pgt,
    lengths_pg,
    *,
    arch,
    tx: optax.GradientTransformation,
) -> tuple[State, jax.Array]:
    """One step of maximum likelihood on given completions; returns the loss too (nats per token)."""

    def mean_nll(params: Any) -> jax.Array:
        logp_pgt = logprobs.completion_logps(arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt)
        return -jnp.sum(logp_pgt * logprobs.mask(lengths_pg, tokens_pgt.shape[-1])) / jnp.sum(lengths_pg)

    value, grads = jax.value_and_grad(mean_nll)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    return placement.constrain(new, arch, tx), value
