"""The update's loss on a real transformer: its expected gradient over all strings against the exact objective's."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mara_jax.config import Algorithm
from mara_jax.core import augment
from mara_jax.policies import transformer
from mara_jax.sampling import logprobs
from mara_jax.train import step
from mara_jax.train.state import Batch, BySampler, Hyperparameters

END, WIDTH, BETA, TAU = 3, 2, 0.3, 0.5
HYPER = Hyperparameters(BETA, TAU)
ARCH = transformer.Architecture(
    family="qwen3", vocab_size=4, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16
)
STRINGS = [
    s
    for n in range(1, WIDTH + 1)
    for s in itertools.product(range(4), repeat=n)
    if END not in s[:-1] and (s[-1] == END or n == WIDTH)
]
TOKENS = jnp.array([[*s, *[0] * (WIDTH - len(s))] for s in STRINGS])
LENGTHS = jnp.array([len(s) for s in STRINGS])
REWARD = jnp.array([1.0 if s[-1] == END and len(s) > 1 else 0.0 for s in STRINGS])
ANSWER = jnp.array([s[0] % 2 if r else -1 for s, r in zip(STRINGS, REWARD.tolist(), strict=True)])
# Scores of eight samples of the reference: a bad one has an answer, too.
REF_REWARD, REF_ANSWER = jnp.array([1.0, 1, 0, 1, 0, 0, 1, 0]), jnp.array([0, 0, 0, 1, -1, -1, 0, -1])
PROMPT, PROMPT_LENGTH = jnp.array([[1, 2, 0]]), jnp.array([2])


@functools.cache
def params_of(seed: int) -> dict:
    init = jax.jit(transformer.init, static_argnums=0)
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, init(ARCH, jax.random.key(seed)))


@jax.jit
def string_logp(params) -> jax.Array:
    logp = logprobs.completion_logps(ARCH, params, PROMPT, PROMPT_LENGTH, TOKENS[None])
    return jnp.sum(logp[0] * logprobs.mask(LENGTHS[None], WIDTH)[0], axis=-1)


def choices_of(algorithm: Algorithm, micro_batches: int = 1) -> step.Choices:
    return step.Choices(ARCH, algorithm, optax.identity(), micro_batches)


def batch_of(index, ref_params) -> Batch:
    """A group of the strings at `index`."""
    tokens = TOKENS[index][None]
    hidden = logprobs.reference_hidden(ARCH, ref_params, PROMPT, PROMPT_LENGTH, tokens)
    return Batch(
        prompt_tokens=PROMPT,
        prompt_lengths=PROMPT_LENGTH,
        tokens=tokens,
        lengths=LENGTHS[index][None],
        reward=REWARD[index][None],
        answer=ANSWER[index][None],
        prompt_ids=jnp.zeros(1, jnp.int32),
        ref_hidden=hidden,
        ref_reward=REF_REWARD[None],
        ref_answer=REF_ANSWER[None],
    )


def masses(direction: str) -> jax.Array:
    """By hand: three samples of eight are good and of answer 0, one of answer 1."""
    return jnp.log(jnp.array([3 / 8, 1 / 8])) + (1 / BETA if direction == "reverse" else 0.0)


def objective(params, ref_logp, algorithm: Algorithm, log_mass) -> jax.Array:
    """E[R] - beta KL, exact; rewards and reference augmented from the whole set."""
    reward, ref_hat = REWARD, ref_logp
    if algorithm.method == "mara":
        settings = {"beta": BETA, "threshold": TAU, "direction": algorithm.kl}
        reward, ref_hat = (
            x[0] for x in augment.mara_answers(REWARD[None], ref_logp[None], ANSWER[None], log_mass[None], **settings)
        )
    logp = string_logp(params)
    if algorithm.kl == "reverse":
        return jnp.sum(jnp.exp(logp) * (reward - BETA * (logp - ref_logp)))
    return jnp.sum(jnp.exp(logp) * reward) + BETA * jnp.sum(jnp.exp(ref_hat) * logp)


@pytest.mark.parametrize(
    "algorithm",
    [
        Algorithm(method="mara", anchor="answer"),
        Algorithm(method="vanilla", estimator="k2_in_loss"),
        Algorithm(method="mara", kl="forward"),
        Algorithm(method="mara", kl="forward", estimator="ratio"),
        Algorithm(method="vanilla", kl="forward", estimator="k3_in_loss"),
    ],
    ids=lambda a: f"{a.method}-{a.kl}-{a.estimator}",
)
def test_expected_gradient_is_the_objectives(algorithm):
    """Groups of two independent strings, leave-one-out baseline, weighted by their probability under the policy."""
    params, ref_params = params_of(1), params_of(2)
    ref_logp, log_mass = string_logp(ref_params), masses(algorithm.kl)
    pairs = jnp.array(list(itertools.product(range(len(STRINGS)), repeat=2)))
    logp = string_logp(params)
    assert abs(float(jnp.exp(logp).sum()) - 1) < 1e-5
    weight = jnp.exp(logp[pairs].sum(-1))
    # The likelihood term's strings come from the reference and do not interact with the policy's: one expectation each.
    ref_weight = jnp.exp(ref_logp)

    def expected(params):
        def of_pair(pair, other):
            reference = None if other is None else batch_of(other[None], ref_params)
            batch = batch_of(pair, ref_params)
            choices = choices_of(algorithm)
            return step.loss(params, ref_params, BySampler(batch, reference), HYPER, choices)[0]

        if algorithm.kl == "forward" and algorithm.estimator == "auto":
            fixed = jax.vmap(lambda pair: of_pair(pair, jnp.int32(0)))(pairs)
            likelihood = jax.vmap(lambda other: of_pair(pairs[0], other))(jnp.arange(len(STRINGS)))
            # Subtract what each sum holds of the other's fixed part.
            return weight @ fixed + ref_weight @ likelihood - of_pair(pairs[0], jnp.int32(0))
        return weight @ jax.vmap(lambda pair: of_pair(pair, None))(pairs)

    found = jax.jit(jax.grad(expected))(params)
    exact = jax.jit(jax.grad(lambda p: -objective(p, ref_logp, algorithm, log_mass)))(params)
    flat, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, exact))
    assert np.linalg.norm(want) > 1e-2
    assert np.linalg.norm(flat - want) / np.linalg.norm(want) < 2e-4


def test_metrics_by_hand():
    params, ref_params = params_of(1), params_of(2)
    ref_logp = string_logp(ref_params)
    index = jnp.array([int(jnp.argmax(REWARD)), 0])
    batch = batch_of(index, ref_params)
    choices = choices_of(Algorithm())
    _, (metrics, *_) = jax.jit(lambda params: step.loss(params, ref_params, BySampler(batch), HYPER, choices))(params)
    logp = string_logp(params)[index]
    assert float(metrics["reward/mean"]) == pytest.approx(float(REWARD[index].mean()))
    assert float(metrics["kl/k1"]) == pytest.approx(float((logp - ref_logp[index]).mean()), abs=1e-5)
    assert float(metrics["logp/mean"]) == pytest.approx(float(logp.mean()), abs=1e-5)
    mass = masses("reverse")
    bonus = BETA * float(mass.max() - mass[int(ANSWER[index[0]])])
    assert float(metrics["reward/augmented_mean"]) == pytest.approx((1 + bonus) / 2, abs=1e-5)
    assert float(metrics["mara/augmented_fraction"]) == (0.5 if bonus > 0 else 0.0)


@pytest.mark.parametrize(
    "algorithm",
    [Algorithm(), pytest.param(Algorithm(method="mara", kl="forward"), marks=pytest.mark.slow)],
    ids=["reverse", "forward-from-samples"],
)
def test_parts_of_a_batch_add_up_to_the_whole(algorithm):
    """Six padded samples at once, and packed in three parts: the gradient and the metrics of the whole groups."""
    params, ref_params = params_of(1), params_of(2)
    index, other = jnp.array([0, 3, 5, 7, 5, 2]), jnp.array([1, 1, 4, 5, 0, 3])

    def batch(chosen, parts, buckets):
        packing = logprobs.packed(np.asarray(LENGTHS[chosen][None]), WIDTH, buckets, parts=parts)
        tokens = TOKENS[chosen][None]
        hidden = logprobs.reference_hidden(ARCH, ref_params, PROMPT, PROMPT_LENGTH, tokens, packing, parts)
        return batch_of(chosen, ref_params).replace(ref_hidden=hidden, packing=packing)

    def gradient(parts, buckets):
        reference = batch(other, parts, buckets) if algorithm.kl == "forward" else None
        batches, choices = BySampler(batch(index, parts, buckets), reference), choices_of(algorithm, parts)
        grads, (metrics, *_) = jax.jit(lambda p, batches: step.gradient(p, ref_params, batches, HYPER, choices))(
            params, batches
        )
        return grads, metrics

    whole, metrics = gradient(1, 0)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole))
    for parts, buckets in ((3, 8), (6, 0)):
        summed, same = gradient(parts, buckets)
        chex.assert_trees_all_close(summed, whole, atol=1e-6 * scale, rtol=0)
        chex.assert_trees_all_close(same, metrics, rtol=1e-5, atol=1e-6)
