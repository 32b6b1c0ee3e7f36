"""The head of a reward model: one number for a whole sequence, from the hidden state of its last token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies import parameters, transformer
from mara_jax.policies.parameters import Architecture


def sequence_scores(arch: Architecture, params: Any, tokens_bt: jax.Array, lengths_b: jax.Array) -> jax.Array:
    """The scores of right-padded sequences; differentiable in params.

    Args:
      arch: with a score head, static; params: nested dict; tokens_bt: ids, of which each row's first `lengths_b` (at
        least one) count.

    Returns:
      [b] float32 (reward units; float64 of a model computed in it): hidden state of the last token times the head.
    """
    # Causality hides padding on the right; clearing it keeps an out-of-range pad id out of the embedding.
    counted_bt = jnp.arange(tokens_bt.shape[1]) < lengths_b[:, None]
    positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    hidden_btd, _ = transformer.forward(arch, params, jnp.where(counted_bt, tokens_bt, 0), positions_bt)
    last_bd = jnp.take_along_axis(hidden_btd, (lengths_b - 1)[:, None, None], axis=1)[:, 0]
    kernel_d1 = sharding.gather_kernel(parameters.at(params, parameters.SCORE), ("embed", None))
    # Not a matmul, which accelerators would round to fewer bits than float32 has.
    wide = parameters.wide(arch.compute_dtype)
    return jnp.sum(last_bd.astype(wide) * kernel_d1[:, 0].astype(wide), axis=-1)  # pyright: ignore[reportIndexIssue]


compiled_scores = functools.partial(jax.jit, static_argnums=0)(sequence_scores)
