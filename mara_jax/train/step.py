"""The pure update: reward augmentation, objective, gradient, optimiser."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mara_jax import config
from mara_jax.core import advantages, augment, objectives
from mara_jax.policies import transformer
from mara_jax.sampling import logprobs
from mara_jax.train.state import Batch, State


def augmented(algorithm: config.Algorithm, batch: Batch, beta, threshold) -> tuple[jax.Array, jax.Array]:
    """The reward-transform stage: (reward, ref_logp), both [p, g], as the objective sees them.

    Args:
      algorithm: chooses the method, its anchor and the direction; static.
      beta, threshold: traced, so that they can be swept.
    """
    if algorithm.method == "vanilla":
        return batch.reward, batch.ref_logp
    settings = {"beta": beta, "threshold": threshold, "direction": algorithm.kl}
    if algorithm.anchor == "string":
        return augment.mara(batch.reward, batch.ref_logp, **settings)
    return augment.mara_answers(batch.reward, batch.ref_logp, batch.answer, batch.log_mass, **settings)


def loss(
    params: Any,
    ref_params: Any,
    arch: transformer.Architecture,
    algorithm: config.Algorithm,
    batch: Batch,
    reference: Batch | None,
    beta,
    threshold,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar to minimise, and metrics of the batch.

    Args:
      batch: completions of the policy itself.
      reference: completions of the reference; needed by the estimator "reference_samples" alone.
    """
    logp_pgt, mask_pgt, kl_pgt = _logps_and_kl(params, ref_params, arch, batch)
    shared = {"beta": beta, "advantage": advantages.BY_NAME[algorithm.baseline]}
    estimator = config.estimator_of(algorithm)
    if estimator == "reference_samples":
        assert reference is not None, "the estimator reference_samples needs completions of the reference"
        reward_pg, ref_logp_pg, ref_hat_pr = _augmented_together(algorithm, batch, reference, beta, threshold)
        ref_logp_prt, ref_mask_prt, _ = _logps_and_kl(params, ref_params, arch, reference)
        weight_pr = jnp.exp(ref_hat_pr - reference.ref_logp)
        value, metrics = objectives.forward_kl_samples(
            logp_pgt, mask_pgt, reward_pg, ref_logp_prt, ref_mask_prt, weight_pr, **shared
        )
    elif estimator in ("k2_in_loss", "k3_in_loss"):
        reward_pg, ref_logp_pg = augmented(algorithm, batch, beta, threshold)
        value, metrics = objectives.placed(
            logp_pgt, mask_pgt, ref_logp_pg[..., None], reward_pg,
            estimator="k2" if estimator == "k2_in_loss" else "k3", placement="loss", level="sequence", **shared,
        )  # fmt: skip
    else:
        reward_pg, ref_logp_pg = augmented(algorithm, batch, beta, threshold)
        objective = {"k1_in_reward": objectives.reverse_kl, "ratio": objectives.forward_kl_ratio}[estimator]
        value, metrics = objective(logp_pgt, mask_pgt, ref_logp_pg, reward_pg, **shared)
    logp_pg = jax.lax.stop_gradient(jnp.sum(logp_pgt * mask_pgt, axis=-1))
    changed_pg = (reward_pg != batch.reward) | (ref_logp_pg != batch.ref_logp)
    metrics = {f"objective/{name}": scalar for name, scalar in metrics.items()} | {
        "loss": value,
        "reward/mean": jnp.mean(batch.reward),
        "reward/augmented_mean": jnp.mean(reward_pg),
        "mara/augmented_fraction": jnp.mean(changed_pg.astype(jnp.float32)),
        "kl/reverse": jnp.mean(jnp.sum(kl_pgt * mask_pgt, axis=-1)),
        "kl/k1": jnp.mean(logp_pg - batch.ref_logp),
        "length/mean": jnp.mean(batch.lengths.astype(jnp.float32)),
        "logp/mean": jnp.mean(logp_pg),
    }
    return value, metrics


def _augmented_together(algorithm: config.Algorithm, batch: Batch, reference: Batch, beta, threshold):
    """Augments both groups of a prompt as one, so that reward and likelihood term share their anchor."""
    both = batch.replace(  # pyright: ignore[reportAttributeAccessIssue] - made by flax.struct
        **{
            name: jnp.concatenate([getattr(batch, name), getattr(reference, name)], axis=1)
            for name in ("reward", "answer", "ref_logp")
        }
    )
    reward_pn, ref_logp_pn = augmented(algorithm, both, beta, threshold)
    g = batch.reward.shape[1]
    return reward_pn[:, :g], ref_logp_pn[:, :g], ref_logp_pn[:, g:]


def _logps_and_kl(params, ref_params, arch, batch: Batch):
    """Of each completion token: log-prob, mask, and the exact KL to the reference at its position."""
    hidden_pgtd = logprobs.completion_hidden(arch, params, batch.prompt_tokens, batch.prompt_lengths, batch.tokens)
    logp_pgt, kl_pgt = logprobs.token_logps_and_kl(
        arch, params, ref_params, hidden_pgtd, batch.ref_hidden, batch.tokens
    )
    return logp_pgt, logprobs.mask(batch.lengths, batch.tokens.shape[-1]), kl_pgt


@functools.partial(jax.jit, static_argnames=("arch", "algorithm", "tx"), donate_argnames=("state",))
def update(
    state: State,
    ref_params: Any,
    batch: Batch,
    reference: Batch | None,
    beta: jax.Array,
    threshold: jax.Array,
    *,
    arch: transformer.Architecture,
    algorithm: config.Algorithm,
    tx: optax.GradientTransformation,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimiser step on one batch; the old state's buffers are given up, so ref_params must not share them."""
    grads, metrics = jax.grad(loss, has_aux=True)(
        state.params, ref_params, arch, algorithm, batch, reference, beta, threshold
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    metrics["grad/norm"] = optax.global_norm(grads)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics
