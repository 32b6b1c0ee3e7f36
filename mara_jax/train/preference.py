"""The training step of reward models: the pairwise loss of Bradley and Terry, pure and jitted."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mara_jax.policies.parameters import Architecture
from mara_jax.policies.scores import sequence_scores
from mara_jax.train import placement
from mara_jax.train.state import State


def pair_loss(chosen_p: jax.Array, rejected_p: jax.Array) -> jax.Array:
    """-log sigmoid(r_chosen - r_rejected), the mean over pairs (nats): Bradley and Terry's negative log-likelihood.

    Args:
      chosen_p, rejected_p: [p] scores.
    """
    return -jnp.mean(jax.nn.log_sigmoid(chosen_p - rejected_p))


def metrics_of(chosen_p: jax.Array, rejected_p: jax.Array) -> dict[str, jax.Array]:
    """Share of pairs that are ranked right (a tie counts half), mean margin and mean score."""
    margin_p = chosen_p - rejected_p
    return {
        "pairs/accuracy": jnp.mean((jnp.sign(margin_p) + 1) / 2),
        "pairs/margin": jnp.mean(margin_p),
        "pairs/score": jnp.mean(chosen_p + rejected_p) / 2,
    }


@functools.partial(jax.jit, static_argnames=("arch", "tx"), donate_argnames=("state",))
def update(
    state: State,
    tokens_bt: jax.Array,
    lengths_b: jax.Array,
    *,
    arch: Architecture,
    tx: optax.GradientTransformation,
) -> tuple[State, dict[str, jax.Array]]:
    """One step on p pairs.

    Args:
      tokens_bt, lengths_b: of 2 p sequences, each chosen one followed by the one rejected.

    Returns:
      The new state, and metrics before the step: loss (nats a pair) and those of `metrics_of`, float32.
    """

    def loss_of(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores_p2 = sequence_scores(arch, params, tokens_bt, lengths_b).reshape(-1, 2)
        loss = pair_loss(scores_p2[:, 0], scores_p2[:, 1])
        return loss, {"pairs/loss": loss} | metrics_of(scores_p2[:, 0], scores_p2[:, 1])

    (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    grads = placement.constrain_params(grads, arch)
    metrics["gradient/norm"] = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    return placement.constrain(new, arch, tx), metrics
