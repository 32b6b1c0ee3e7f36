"""One whole toy training as a pure function, and grids of them as one XLA program.

Every method of `core.methods` is trained through the rows that a language model's update uses: the batch is one
prompt's group, a sample is a completion of one token, and its answer is the outcome itself. Choices and counts are
static; numbers that are swept are traced, so the same code serves `jax.vmap`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from mara_jax import config
from mara_jax.core import bounded, kl, method_rules
from mara_jax.core.scored import Numbers, Scored
from mara_jax.policies import categorical
from mara_jax.toy.choices import Choices, check, has_traced_optimum, known_optimum, optimum

__all__ = ["Choices", "Run", "Swept", "check", "grid", "has_traced_optimum", "known_optimum", "optimum", "train"]


@struct.dataclass
class Swept:
    """The traced numbers of a run: regularisation strength, threshold, Adam's step size, seed."""

    beta: Float[Array, "*sweep"]
    threshold: Float[Array, "*sweep"]
    learning_rate: Float[Array, "*sweep"]
    seed: Int[Array, "*sweep"]


class Run(NamedTuple):
    """The final policy of a run and its metrics over the steps.

    `logp_a` final log-probabilities (nats); `target_logp_a` those of the objective's own optimum, nan where none is
    known (and so are distances to it);
    `distance_to_target` and `distance_to_uniform` the total variation from `logp_a` to that optimum and to
    the uniform distribution over good outcomes. With one entry a recorded step, exact even with sampled gradients:
    `reward_s` the expected reward, `distance_s` and `uniform_distance_s` those two distances,
    `kl_to_target_s` KL(pi || optimum) and `kl_from_target_s` KL(optimum || pi) in nats.
    """

    logp_a: Float[Array, "*sweep a"]
    target_logp_a: Float[Array, "*sweep a"]
    distance_to_target: Float[Array, "*sweep"]
    distance_to_uniform: Float[Array, "*sweep"]
    reward_s: Float[Array, "*sweep s"]
    distance_s: Float[Array, "*sweep s"]
    uniform_distance_s: Float[Array, "*sweep s"]
    kl_to_target_s: Float[Array, "*sweep s"]
    kl_from_target_s: Float[Array, "*sweep s"]


def total_variation(logp_a: Float[Array, "*n a"], other_logp_a: Float[Array, "*n a"]) -> Float[Array, "*n"]:
    """Half the summed absolute difference of two distributions.

    Args:
        logp_a: log-probabilities of a distribution (nats).
        other_logp_a: log-probabilities of the other (nats).

    Returns:
        Between 0 (equal) and 1 (disjoint).
    """
    return jnp.sum(jnp.abs(jnp.exp(logp_a) - jnp.exp(other_logp_a)), axis=-1) / 2


def train(
    ref_logp_a: Float[Array, " a"],
    reward_a: Float[Array, " a"],
    swept: Swept,
    choices: Choices,
    target_logp_a: Float[Array, " a"] | None = None,
) -> Run:
    """Trains a free categorical policy from uniform with Adam; pure, and jittable with `choices` static.

    Args:
        ref_logp_a: log-probabilities of the reference (nats).
        reward_a: reward of each outcome.
        swept: scalars of this run; batches of runs by `jax.vmap`.
        choices: method, direction, estimators, steps and batch.
        target_logp_a: the objective's own optimum as `optimum` returns it, where it is not that of vanilla or of MARA
            over strings, which are computed here.

    Returns:
        The final policy and the recorded metrics.

    Raises:
        ValueError: for an unknown choice.
    """
    check(choices)
    # jax's default precision, whatever that of the problem's arrays: float64 only where it is enabled.
    dtype = jnp.result_type(float)
    ref_logp_a, reward_a = jnp.asarray(ref_logp_a, dtype), jnp.asarray(reward_a, dtype)
    if target_logp_a is None and has_traced_optimum(choices):
        target_logp_a = optimum(ref_logp_a, reward_a, swept.beta, swept.threshold, choices)
    target_logp_a = jnp.full_like(ref_logp_a, jnp.nan) if target_logp_a is None else target_logp_a
    good_a = reward_a >= swept.threshold
    uniform_a = jnp.where(good_a, -jnp.log(jnp.maximum(jnp.sum(good_a), 1)), -jnp.inf)
    tx = optax.adam(swept.learning_rate)
    key = jax.random.key(swept.seed)

    def step(carry, index):
        logits_a, opt_state, log_z = carry
        sample_key = jax.random.fold_in(key, index)
        gradient_a, log_z = _gradient(logits_a, log_z, ref_logp_a, reward_a, swept, choices, sample_key)
        updates_a, opt_state = tx.update(gradient_a, opt_state)
        return (logits_a + updates_a, opt_state, log_z), None

    def recorded(carry, index_e):
        metrics = _metrics(categorical.log_probs(carry[0]), reward_a, target_logp_a, uniform_a)
        return jax.lax.scan(step, carry, index_e)[0], metrics

    logits_a = jnp.zeros_like(ref_logp_a)
    steps_se = jnp.arange(choices.steps).reshape(-1, choices.every)
    start = logits_a, tx.init(logits_a), jnp.asarray(-jnp.inf, dtype)
    (logits_a, *_), metrics_s = jax.lax.scan(recorded, start, steps_se)
    logp_a = categorical.log_probs(logits_a)
    return Run(
        logp_a,
        target_logp_a,
        total_variation(logp_a, target_logp_a),
        total_variation(logp_a, uniform_a),
        *metrics_s,
    )


def _metrics(logp_a, reward_a, target_logp_a, uniform_a):
    """What `Run` records at a step."""
    return (
        jnp.sum(jnp.exp(logp_a) * reward_a),
        total_variation(logp_a, target_logp_a),
        total_variation(logp_a, uniform_a),
        kl.reverse(logp_a, target_logp_a),
        kl.forward(logp_a, target_logp_a),
    )


def _grid(ref_logp_a, reward_a, beta_b, seed_n, threshold, learning_rate, target_ba, choices):
    def train_run(beta, target_a, seed):
        return train(ref_logp_a, reward_a, Swept(beta, threshold, learning_rate, seed), choices, target_a)

    return jax.vmap(jax.vmap(train_run, (None, None, 0)), (0, 0, None))(beta_b, target_ba, seed_n)


_grid_jit = jax.jit(_grid, static_argnames="choices")


def grid(
    ref_logp_a: Float[Array, " a"],
    reward_a: Float[Array, " a"],
    *,
    betas: Float[Array, " b"],
    seeds: Int[Array, " n"],
    threshold: float,
    learning_rate: float,
    choices: Choices,
) -> Run:
    """Every beta with every seed, as one compiled program.

    Args:
        ref_logp_a: log-probabilities of the reference (nats).
        reward_a: reward of each outcome.
        betas: regularisation strengths.
        seeds: random seeds.
        threshold: reward from which an outcome is good.
        learning_rate: Adam's step size.
        choices: the same for all runs.

    Returns:
        A `Run` whose arrays have two leading axes, betas and seeds.

    Raises:
        ValueError: for an unknown choice, or rewards that the method cannot take.
    """
    check(choices)
    method_rules.check_rewards(choices.algorithm, reward_a)
    dtype, target_ba = jnp.result_type(float), None
    if not has_traced_optimum(choices):
        target_ba = jnp.stack(
            [jnp.asarray(known_optimum(ref_logp_a, reward_a, beta, threshold, choices), dtype) for beta in betas]
        )
    return _grid_jit(
        jnp.asarray(ref_logp_a, dtype),
        jnp.asarray(reward_a, dtype),
        jnp.asarray(betas, dtype),
        jnp.asarray(seeds),
        jnp.asarray(threshold, dtype),
        jnp.asarray(learning_rate, dtype),
        target_ba,
        choices=choices,
    )


def _scored(logp_a, index_g, ref_logp_a, reward_a) -> Scored:
    """Outcomes as one prompt's completions of one token, each an answer of its own."""
    logp_1g1, ref_1g = logp_a[index_g][None, :, None], ref_logp_a[index_g][None]
    scored = Scored(logp_1g1, jnp.ones_like(logp_1g1), ref_1g, reward_a[index_g][None], index_g[None])
    return scored._replace(ref_token_logp=ref_1g[..., None])


def _gradient(logits_a, log_z, ref_logp_a, reward_a, swept, choices, key):
    """Gradient of the loss at the logits: minus that of the objective, or an estimate of it; and what log Z becomes."""
    algorithm, numbers = choices.algorithm, Numbers(swept.beta, swept.threshold, choices.eta)
    transform, objective = method_rules.rows(algorithm)
    made_for = dataclasses.replace(algorithm, kl=choices.augmentation or choices.direction)
    logp_a, every_a = jax.lax.stop_gradient(categorical.log_probs(logits_a)), jnp.arange(reward_a.shape[-1])
    whole = _scored(logp_a, every_a, ref_logp_a, reward_a)
    if transform.anchor is not None:
        # Over all outcomes at once the group is the whole set, so its anchor is the anchor over the good set.
        reward_1a, ref_1a = transform.apply(made_for, whole, numbers)
        whole = whole._replace(reward=reward_1a, ref_logp=ref_1a)
    if choices.gradients == "exact":
        exact_a = categorical.exact_gradient(
            logits_a, whole.ref_logp[0], whole.reward[0], swept.beta, choices.direction
        )
        return -exact_a, log_z

    sample_key, ref_key = jax.random.split(key)
    sample_g = categorical.sample(sample_key, logp_a, choices.batch)
    scored = _scored(logp_a, sample_g, ref_logp_a, reward_a)
    if transform.anchor is not None and choices.anchor == "all":
        reward_1g, ref_logp_1g = whole.reward[:, sample_g], whole.ref_logp[:, sample_g]
    else:
        reward_1g, ref_logp_1g = transform.apply(made_for, scored, numbers)
    scored = scored._replace(reward=reward_1g, ref_logp=ref_logp_1g)
    reference, ref_sample_r = None, every_a
    if method_rules.reads_reference_samples(algorithm):
        if choices.forward_estimator == "samples":
            ref_sample_r = categorical.sample(ref_key, ref_logp_a, choices.batch)
            weight_1r = bounded.exp(whole.ref_logp - ref_logp_a)[:, ref_sample_r]
        else:  # every outcome once, weighted so that the mean over outcomes is the sum over the reference
            weight_1r = jnp.exp(whole.ref_logp) * ref_logp_a.shape[-1]
        reference = _scored(logp_a, ref_sample_r, ref_logp_a, reward_a)._replace(ref_weight=weight_1r)
    if objective.learns_log_z:
        scored, log_z = _with_log_z(scored, log_z, algorithm, numbers)

    def loss(logits_a):
        logp_a = categorical.log_probs(logits_a)
        live = scored._replace(logp=logp_a[sample_g][None, :, None])
        other = reference and reference._replace(logp=logp_a[ref_sample_r][None, :, None])
        return objective.loss(algorithm, live, other, numbers)[0]

    return jax.grad(loss)(logits_a), log_z


def _with_log_z(scored: Scored, log_z, algorithm: config.Algorithm, numbers: Numbers):
    """The prompt's log Z beside its samples, and as learned from them, as a language model's update learns it."""
    untransformed = dataclasses.replace(algorithm, transform="none")  # rewards are transformed already
    (estimate,) = method_rules.log_z_estimate(untransformed, scored, numbers)
    log_z = jnp.where(log_z == -jnp.inf, estimate, log_z)
    return scored._replace(prompt_log_z=log_z[None]), log_z + 2 * method_rules.LOG_Z_STEP * (estimate - log_z)
