"""Several updates on one rollout of a real transformer, and what its numbers are kept in."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mara_jax.config import Algorithm, LanguageRun, Optimiser
from mara_jax.core import methods
from mara_jax.policies import transformer
from mara_jax.sampling import logprobs
from mara_jax.train import optim, programs, step
from mara_jax.train.state import Batch, BySampler, Hyperparameters, State

ARCH = transformer.Architecture(
    family="qwen3", vocab_size=5, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16
)
BETA, TAU, LARGE = 0.3, 0.5, Optimiser(learning_rate=0.02)
TOKENS = jnp.array([[[0, 3, 1], [2, 4, 0], [1, 1, 4], [4, 0, 0]]])
LENGTHS = jnp.array([[3, 2, 3, 1]])
PROMPT, PROMPT_LENGTH = jnp.array([[1, 2, 0]]), jnp.array([2])
SEQUENCE = Algorithm(method="mara", anchor="string", beta=BETA, threshold=TAU, importance="sequence")
TOKEN = dataclasses.replace(SEQUENCE, importance="token", clip=0.2)
TODAY = dataclasses.replace(SEQUENCE, importance="none")


@functools.cache
def params_of(seed: int):
    init = jax.jit(transformer.init, static_argnums=0)
    return jax.tree.map(lambda x: np.asarray(x) * 4 if x.ndim > 1 else np.asarray(x), init(ARCH, jax.random.key(seed)))


@jax.jit
def token_logp(params):
    return logprobs.completion_logps(ARCH, params, PROMPT, PROMPT_LENGTH, TOKENS)


@functools.cache
def _hidden(parts):
    return jax.jit(lambda params: logprobs.reference_hidden(ARCH, params, PROMPT, PROMPT_LENGTH, TOKENS, None, parts))


@functools.cache
def batch(parts: int = 1, sampler: int | None = None) -> Batch:
    hidden = _hidden(parts)(params_of(2))
    return Batch(
        prompt_tokens=PROMPT,
        prompt_lengths=PROMPT_LENGTH,
        tokens=TOKENS,
        lengths=LENGTHS,
        reward=jnp.array([[1.0, 0.0, 0.8, 0.3]]),
        answer=jnp.array([[0, -1, 0, 0]]),
        prompt_ids=jnp.zeros(1, jnp.int32),
        ref_hidden=hidden,
        ref_reward=jnp.ones((1, 2)),
        ref_answer=jnp.zeros((1, 2), jnp.int32),
        sampler_logp=None if sampler is None else token_logp(params_of(sampler)),
    )


def fresh(tx) -> State:
    params = jax.tree.map(jnp.array, params_of(1))
    return State(jnp.int32(0), params, jax.jit(tx.init)(params))


def updated(algorithm, updates=1, parts=1, sampler=None, arch=ARCH):
    choices = step.Choices(arch, algorithm, _adam(), parts, updates)
    hyper = Hyperparameters(jnp.float32(BETA), jnp.float32(TAU))
    return step.update(fresh(_adam()), params_of(2), BySampler(batch(parts, sampler)), hyper, choices)


@functools.cache
def _adam():
    return optim.make(LARGE)


def by_hand(algorithm, params):
    """Three updates written out for this batch of four strings: the weights, and those before the last one."""
    mask, tx = np.asarray(logprobs.mask(LENGTHS, 3)[0]), optax.adam(LARGE.learning_rate)
    reward, ref = np.asarray(batch().reward[0]), np.sum(np.asarray(token_logp(params_of(2))[0]) * mask, -1)
    z = np.argmax(np.where(reward >= TAU, ref, -np.inf))  # of the good strings, the likeliest under the reference
    reward = np.where(reward >= TAU, reward[z] + BETA * (ref[z] - ref), reward)

    def surrogate(params, old):
        logp = token_logp(params)[0] * mask
        signal = jax.lax.stop_gradient(reward - BETA * (jnp.sum(logp, -1) - ref))
        advantage = signal - (jnp.sum(signal) - signal) / 3
        change = logp - old * mask
        if algorithm.importance == "sequence":
            return -jnp.mean(jnp.exp(jnp.sum(change, -1)) * advantage)
        ratio, advantage = jnp.exp(change), advantage[:, None]
        least = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        return -jnp.mean(jnp.sum(least * mask, -1))

    @jax.jit
    def one(params, moments, old):
        changes, moments = tx.update(jax.grad(surrogate)(params, old), moments, params)
        return optax.apply_updates(params, changes), moments

    old, moments, last = token_logp(params)[0], jax.jit(tx.init)(params), params
    for _ in range(3):
        last, (params, moments) = params, one(params, moments, old)
    return params, last


@pytest.mark.parametrize(
    ("algorithm", "parts"), [(TOKEN, 1), pytest.param(SEQUENCE, 2, marks=pytest.mark.slow)], ids=["token", "sequence"]
)
def test_three_updates_are_those_of_a_loop_by_hand(algorithm, parts):
    """Ratios as PPO writes them, differentiated; plain Adam of optax; one state goes on."""
    params, last = by_hand(algorithm, params_of(1))
    state, metrics = updated(algorithm, updates=3, parts=parts)
    assert int(state.step) == 1
    chex.assert_trees_all_close(state.params, params, atol=2e-5, rtol=0)
    # Ratios are the last update's, which saw the policy that the second had left; the rest is the first's.
    mask = np.asarray(logprobs.mask(LENGTHS, 3)[0])
    old = np.asarray(token_logp(params_of(1))[0])
    change = (np.asarray(token_logp(last)[0]) - old) * mask
    ratio = np.exp(change.sum(-1)) if algorithm.importance == "sequence" else np.exp(change)[mask > 0]
    assert np.abs(ratio - 1).max() > 0.2
    assert float(metrics["ratio/max"]) == pytest.approx(max(ratio.max(), 1.0), abs=1e-4)
    assert float(metrics["ratio/mean"]) == pytest.approx(ratio.mean(), abs=1e-4)
    whole = np.exp(change.sum(-1))
    assert float(metrics["ratio/effective_samples"]) == pytest.approx(whole.sum() ** 2 / (whole**2).sum(), abs=1e-3)
    assert float(metrics["logp/mean"]) == pytest.approx((old * mask).sum(-1).mean(), abs=1e-4)


def test_dapo_clips_ratios_of_its_own_over_three_updates():
    """The update's loss as it is published, differentiated by hand with plain Adam."""
    mask, tx = np.asarray(logprobs.mask(LENGTHS, 3)[0]), optax.adam(LARGE.learning_rate)
    reward = np.asarray(batch().reward[0])
    advantage = ((reward - reward.mean()) / (reward.std(ddof=1) + 1e-4))[:, None]

    def surrogate(params, old):
        ratio = jnp.exp((token_logp(params)[0] - old) * mask)
        least = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.28) * advantage)
        return -jnp.sum(least * mask) / mask.sum(), jnp.sum((least < ratio * advantage) * mask) / mask.sum()

    @jax.jit
    def one(params, moments, old):
        gradient, clipped = jax.grad(surrogate, has_aux=True)(params, old)
        changes, moments = tx.update(gradient, moments, params)
        return optax.apply_updates(params, changes), moments, clipped

    params = params_of(1)
    old, moments, clipped = token_logp(params)[0], jax.jit(tx.init)(params), 0
    for _ in range(3):
        params, moments, clipped = one(params, moments, old)
    state, metrics = updated(Algorithm(method="dapo"), updates=3)
    chex.assert_trees_all_close(state.params, params, atol=2e-5, rtol=0)
    assert float(metrics["objective/clipped_fraction"]) == pytest.approx(float(clipped)) and clipped > 0


@pytest.mark.parametrize("method", methods.METHODS)
def test_beta_threshold_and_eta_are_arguments_of_one_program(method):
    """Its static choices are the same at other numbers, and the numbers are those of the configuration."""

    def arguments(**numbers):
        run = LanguageRun(algorithm=Algorithm(method=method, **numbers))
        nothing: Any = None
        return programs.update_program(run, ARCH, _adam(), nothing, nothing, nothing).args[-2:]

    (hyper, choices), (others, same) = arguments(), arguments(beta=0.25, threshold=0.5, eta=0.125)
    assert choices == same and hash(choices) == hash(same)
    assert tuple(map(float, others)) == (0.25, 0.5, 0.125) != tuple(map(float, hyper))


def test_the_first_update_of_a_rollout_is_todays():
    """Its gradient's norm and every metric, though ratios come with it."""
    _, known = updated(TODAY)
    _, first = updated(TOKEN, updates=3)
    chex.assert_trees_all_close({name: first[name] for name in known}, known, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_ratios_change_nothing_where_a_rollout_serves_one_update():
    today, _ = updated(TODAY)
    same, metrics = updated(SEQUENCE)
    chex.assert_trees_all_equal(same.params, today.params)
    assert float(metrics["ratio/max"]) == float(metrics["ratio/mean"]) == 1.0
    assert float(metrics["ratio/effective_samples"]) == pytest.approx(4)


def test_a_sampler_that_agrees_changes_nothing_and_one_that_differs_is_weighted():
    on = dataclasses.replace(TODAY, truncate=1.5)
    today, _ = updated(TODAY)
    agreed, metrics = updated(on, sampler=1)
    chex.assert_trees_all_close(agreed.params, today.params, atol=1e-6, rtol=0)
    assert float(metrics["sampler_weight/max"]) == pytest.approx(1, abs=1e-5)
    mask = np.asarray(logprobs.mask(LENGTHS, 3)[0])
    own, other = (np.asarray(token_logp(params_of(seed)))[0] for seed in (1, 3))
    change = ((own - other) * mask).sum(-1)
    _, metrics = updated(on, sampler=3)
    weight = np.minimum(np.exp(change), 1.5)
    assert weight.min() < 0.9 and weight.max() == 1.5
    assert float(metrics["sampler_weight/mean"]) == pytest.approx(weight.mean(), abs=1e-4)
    assert float(metrics["sampler_weight/truncated_fraction"]) == pytest.approx(np.mean(change > np.log(1.5)))


def dtypes(tree) -> set:
    return {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


def test_bfloat16_computes_and_float32_remembers():
    """Gradients, weights and both moments are float32 where the model multiplies in bfloat16."""
    arch = dataclasses.replace(ARCH, compute_dtype="bfloat16")
    choices, hyper = step.Choices(arch, SEQUENCE, _adam()), Hyperparameters(BETA, TAU)
    gradient = jax.make_jaxpr(
        lambda params: step.gradient(params, params_of(2), BySampler(batch()), hyper, choices)[0]
    )(params_of(1))
    assert {str(x.dtype) for x in gradient.out_avals} == {"float32"}
    assert "bf16[" in str(gradient) and "bf16[" not in str(jax.make_jaxpr(token_logp)(params_of(1)))
    state, metrics = jax.eval_shape(lambda: updated(SEQUENCE, updates=2, arch=arch))
    assert dtypes(state.params) == dtypes(state.opt_state) == dtypes(metrics) == {"float32"}


def test_a_bfloat16_first_moment_alone_is_rounded():
    """Ten steps on made-up gradients: each moves a weight by what Adam says, to bfloat16's 8 bits."""
    params = {"kernel": jnp.zeros((40, 3))}
    grads = [{"kernel": jax.random.normal(jax.random.key(i), (40, 3)) * 0.1 + 1} for i in range(10)]

    def trained(first_moment: str):
        tx, x = optim.make(Optimiser(learning_rate=0.01, first_moment=first_moment)), params
        state, change = tx.init(x), jax.jit(tx.update)
        for g in grads:
            changes, state = change(g, state, x)
            x = optax.apply_updates(x, changes)
        return np.asarray(x["kernel"]), optax.tree.get(state, "mu"), optax.tree.get(state, "nu")

    want, mu, nu = trained("float32")
    assert dtypes((mu, nu)) == {"float32"}
    got, mu, nu = trained("bfloat16")
    assert dtypes(mu) == {"bfloat16"} and dtypes(nu) == {"float32"} and got.dtype == np.float32
    assert 0 < np.abs(got - want).max() < 2**-7 * np.abs(want).max()
