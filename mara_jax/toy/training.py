"""One whole toy training as a pure function, and grids of them as one XLA program.

It uses the same core functions as a language model: the batch is one prompt's group, a sample is a completion
of one token. Choices and counts are static; numbers that are swept are traced, so the same code serves
`jax.vmap`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from mara_jax.core import advantages, augment, kl, objectives, targets
from mara_jax.core.targets import Scalar
from mara_jax.policies import categorical


@dataclass(frozen=True)
class Choices:
    """The static choices of a run.

    `gradients`: "sampled" estimates them from `batch` samples a step, "exact" sums over the outcomes.
    `reverse_estimator` and `forward_estimator`: how the KL is estimated from samples. Reverse: k1 in the reward or k2
    as a loss term. Forward: "samples" of the reference, the "ratio" ref/pi on the policy's own, k3 as a loss term on
    them, or "exact" for the KL alone.
    `anchor`: MARA's anchor from the "batch" (Algorithm 1) or from the whole good set, "all" (as exact gradients do).
    `baseline`: a name in `core.advantages`.
    `augmentation`: the KL that MARA's rewards are made for, by default that of `direction`. Rewards made for the other
    one (Algorithm 1's beside the forward KL) are the mistake that Figure 6 shows.
    `every`: metrics are recorded before every `every`-th step; it must divide `steps`.
    """

    method: Literal["vanilla", "mara"] = "vanilla"
    direction: targets.Direction = "reverse"
    gradients: Literal["sampled", "exact"] = "sampled"
    reverse_estimator: Literal["k1_in_reward", "k2_in_loss"] = "k1_in_reward"
    forward_estimator: Literal["samples", "ratio", "k3_in_loss", "exact"] = "samples"
    anchor: Literal["batch", "all"] = "batch"
    baseline: str = "none"
    augmentation: targets.Direction | None = None
    steps: int = 1000
    batch: int = 32
    every: int = 1


@struct.dataclass
class Swept:
    """The traced numbers of a run: regularisation strength, threshold, Adam's step size, seed."""

    beta: Float[Array, "*sweep"]
    threshold: Float[Array, "*sweep"]
    learning_rate: Float[Array, "*sweep"]
    seed: Int[Array, "*sweep"]


class Run(NamedTuple):
    """The final policy of a run and its metrics over the steps.

    `logp_a` final log-probabilities (nats); `target_logp_a` those of the objective's own optimum;
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


def train(ref_logp_a: Float[Array, " a"], reward_a: Float[Array, " a"], swept: Swept, choices: Choices) -> Run:
    """Trains a free categorical policy from uniform with Adam; pure, and jittable with `choices` static.

    Args:
        ref_logp_a: log-probabilities of the reference (nats).
        reward_a: reward of each outcome.
        swept: scalars of this run; batches of runs by `jax.vmap`.
        choices: method, direction, estimators, steps and batch.

    Returns:
        The final policy and the recorded metrics.

    Raises:
        ValueError: for an unknown choice.
    """
    check(choices)
    # jax's default precision, whatever that of the problem's arrays: float64 only where it is enabled.
    dtype = jnp.result_type(float)
    ref_logp_a, reward_a = jnp.asarray(ref_logp_a, dtype), jnp.asarray(reward_a, dtype)
    target_logp_a = optimum(ref_logp_a, reward_a, swept.beta, swept.threshold, choices)
    good_a = reward_a >= swept.threshold
    uniform_a = jnp.where(good_a, -jnp.log(jnp.maximum(jnp.sum(good_a), 1)), -jnp.inf)
    tx = optax.adam(swept.learning_rate)
    key = jax.random.key(swept.seed)

    def step(carry, index):
        logits_a, opt_state = carry
        gradient_a = _gradient(logits_a, ref_logp_a, reward_a, swept, choices, jax.random.fold_in(key, index))
        updates_a, opt_state = tx.update(gradient_a, opt_state)
        return (logits_a + updates_a, opt_state), None

    def recorded(carry, index_e):
        metrics = _metrics(categorical.log_probs(carry[0]), reward_a, target_logp_a, uniform_a)
        return jax.lax.scan(step, carry, index_e)[0], metrics

    logits_a = jnp.zeros_like(ref_logp_a)
    steps_se = jnp.arange(choices.steps).reshape(-1, choices.every)
    (logits_a, _), metrics_s = jax.lax.scan(recorded, (logits_a, tx.init(logits_a)), steps_se)
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


def _grid(ref_logp_a, reward_a, beta_b, seed_n, threshold, learning_rate, choices):
    def train_run(beta, seed):
        return train(ref_logp_a, reward_a, Swept(beta, threshold, learning_rate, seed), choices)

    return jax.vmap(jax.vmap(train_run, (None, 0)), (0, None))(beta_b, seed_n)


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
        ValueError: for an unknown choice.
    """
    check(choices)
    dtype = jnp.result_type(float)
    return _grid_jit(
        jnp.asarray(ref_logp_a, dtype),
        jnp.asarray(reward_a, dtype),
        jnp.asarray(betas, dtype),
        jnp.asarray(seeds),
        jnp.asarray(threshold, dtype),
        jnp.asarray(learning_rate, dtype),
        choices=choices,
    )


_KNOWN = {
    "method": ("vanilla", "mara"),
    "direction": ("reverse", "forward"),
    "gradients": ("sampled", "exact"),
    "reverse_estimator": ("k1_in_reward", "k2_in_loss"),
    "forward_estimator": ("samples", "ratio", "k3_in_loss", "exact"),
    "anchor": ("batch", "all"),
    "baseline": tuple(advantages.BY_NAME),
    "augmentation": (None, "reverse", "forward"),
}


def check(choices: Choices) -> None:
    """Refuses an unknown choice, and a recording interval that does not divide the steps.

    Args:
        choices: the run's choices.

    Raises:
        ValueError: naming the field, its value and the known ones.
    """
    for field, known in _KNOWN.items():
        value = getattr(choices, field)
        if value not in known:
            raise ValueError(f"{field} {value!r} is not known: use one of {', '.join(map(str, known))}")
    if choices.every < 1 or choices.steps % choices.every:
        raise ValueError(f"every {choices.every} does not divide the {choices.steps} steps: use a divisor of them")


def optimum(
    ref_logp_a: Float[Array, " a"], reward_a: Float[Array, " a"], beta: Scalar, threshold: Scalar, choices: Choices
) -> Float[Array, " a"]:
    """The distribution that maximises the objective.

    Args:
        ref_logp_a: log-probabilities of the reference (nats).
        reward_a: reward of each outcome.
        beta: regularisation strength, above 0.
        threshold: reward from which an outcome is good.
        choices: method, direction and augmentation.

    Returns:
        Log-probabilities (nats).
    """
    direction = choices.direction
    if choices.method == "mara" and choices.augmentation in (None, direction):
        return targets.mara(ref_logp_a, reward_a, beta, threshold, direction)
    if choices.method == "mara":
        whole_set = {"beta": beta, "threshold": threshold, "direction": choices.augmentation}
        (reward_a,), (ref_logp_a,) = augment.mara(reward_a[None], ref_logp_a[None], **whole_set)
    return (targets.reverse_kl if direction == "reverse" else targets.forward_kl)(ref_logp_a, reward_a, beta)


def _gradient(logits_a, ref_logp_a, reward_a, swept, choices, key):
    """Gradient of the loss at the logits: minus that of the objective, or an estimate of it."""
    # Over all outcomes at once the group is the whole set, so its anchor is the anchor over the good set.
    direction = choices.augmentation or choices.direction
    settings = {"beta": swept.beta, "threshold": swept.threshold, "direction": direction}
    all_reward_1a, all_ref_1a = reward_a[None], ref_logp_a[None]
    if choices.method == "mara":
        all_reward_1a, all_ref_1a = augment.mara(all_reward_1a, all_ref_1a, **settings)
    if choices.gradients == "exact":
        return -categorical.exact_gradient(logits_a, all_ref_1a[0], all_reward_1a[0], swept.beta, choices.direction)

    sample_key, ref_key = jax.random.split(key)
    sample_g = categorical.sample(sample_key, categorical.log_probs(logits_a), choices.batch)
    reward_1g, ref_logp_1g = reward_a[sample_g][None], ref_logp_a[sample_g][None]
    if choices.method == "mara" and choices.anchor == "batch":
        reward_1g, ref_logp_1g = augment.mara(reward_1g, ref_logp_1g, **settings)
    elif choices.method == "mara":
        reward_1g, ref_logp_1g = all_reward_1a[:, sample_g], all_ref_1a[:, sample_g]
    mask_1g1 = jnp.ones((1, choices.batch, 1))
    common = {"beta": swept.beta, "advantage": advantages.BY_NAME[choices.baseline]}

    def loss(logits_a):
        logp_a = categorical.log_probs(logits_a)
        logp_1g1 = logp_a[sample_g][None, :, None]
        estimator = choices.reverse_estimator if choices.direction == "reverse" else choices.forward_estimator
        if estimator in ("k2_in_loss", "k3_in_loss"):
            placed = {"estimator": estimator[:2], "placement": "loss", "level": "sequence"}
            return objectives.placed(logp_1g1, mask_1g1, ref_logp_1g[..., None], reward_1g, **placed, **common)[0]
        if choices.direction == "reverse":
            return objectives.reverse_kl(logp_1g1, mask_1g1, ref_logp_1g, reward_1g, **common)[0]
        if choices.forward_estimator == "ratio":
            return objectives.forward_kl_ratio(logp_1g1, mask_1g1, ref_logp_1g, reward_1g, **common)[0]
        if choices.forward_estimator == "samples":
            ref_sample_r = categorical.sample(ref_key, ref_logp_a, choices.batch)
            weight_1r = jnp.exp(all_ref_1a - ref_logp_a)[:, ref_sample_r]
        else:  # every outcome once, weighted so that the mean over outcomes is the sum over the reference
            ref_sample_r = jnp.arange(ref_logp_a.shape[-1])
            weight_1r = jnp.exp(all_ref_1a) * ref_logp_a.shape[-1]
        ref_sample_logp_1r1 = logp_a[ref_sample_r][None, :, None]
        return objectives.forward_kl_samples(
            logp_1g1, mask_1g1, reward_1g, ref_sample_logp_1r1, jnp.ones_like(ref_sample_logp_1r1), weight_1r, **common
        )[0]

    return jax.grad(loss)(logits_a)
