"""Exponentials of log-ratios: unchanged where ratios are, bounded far beyond, in every method's value and gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.config import Algorithm
from mara_jax.core import bounded, importance, kl, method_rules, methods, objectives, pooled_samples
from mara_jax.core.scored import Numbers, Scored

pytestmark = pytest.mark.usefixtures("x64")

FAR = 1000.0
NUMBERS = Numbers(0.1, 0.8, 0.01)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("ours", "plain"), [(bounded.exp, jnp.exp), (bounded.expm1, jnp.expm1)])
def test_what_stays_below_the_bound_keeps_its_bits(dtype, ours, plain):
    x = jnp.asarray([*np.linspace(-60, bounded.LARGEST, 301), 1e-9, -1e-9, -jnp.inf], dtype)
    np.testing.assert_array_equal(ours(x), plain(x))
    np.testing.assert_array_equal(jax.vmap(jax.grad(ours))(x), jax.vmap(jax.grad(plain))(x))


def test_beyond_the_bound_value_and_gradient_stay_where_they_are():
    want = np.exp(300.0)
    x = jnp.array([300.0, 301.0, FAR, jnp.inf])
    np.testing.assert_allclose(bounded.exp(x), want)
    np.testing.assert_allclose(jax.vmap(jax.grad(bounded.exp))(x), want)
    np.testing.assert_allclose(bounded.expm1(x), np.expm1(300.0))
    np.testing.assert_allclose(jax.vmap(jax.grad(bounded.expm1))(x), want)
    assert np.isnan(bounded.exp(jnp.nan)) and np.isnan(bounded.expm1(jnp.nan))
    narrow = bounded.exp(jnp.array([30.0, 31.0, FAR], jnp.float32))
    np.testing.assert_allclose(narrow, np.exp(30.0), rtol=1e-6)
    # A norm squares it: the square stays below the dtype's largest, with room for a factor of a million.
    assert np.square(narrow).max() < np.finfo(np.float32).max / 1e12 and np.isfinite(np.square(want) * 1e12)


def test_k3_by_hand_far_from_the_reference():
    """-1,000 nats: expm1(-1,000) + 1,000. +1,000: the bounded ratio less 1,001; it pulls toward the reference."""
    np.testing.assert_allclose(kl.k3(0.0, -FAR), -1 + FAR)
    np.testing.assert_allclose(kl.k3(0.0, FAR), np.expm1(300.0) - FAR)
    gradient = jax.grad(lambda logp: kl.k3(logp, FAR))(0.0)
    np.testing.assert_allclose(gradient, 1 - np.exp(300.0))
    assert jax.grad(lambda logp: kl.k3(logp, -FAR))(0.0) == 1


def test_a_ratio_beyond_all_bounds_times_no_advantage_is_nothing():
    log_ratio = jnp.array([[[FAR], [-FAR], [0.0]]])
    for clip in (0.0, 0.2):
        factor = importance.coefficient(importance.OffPolicy(log_ratio, jnp.ones((1, 3, 1)), clip), jnp.zeros((1, 3)))
        np.testing.assert_allclose(factor[0, :, 0] * 0, 0)
    np.testing.assert_allclose(importance.truncated(log_ratio, 1e300)[0, :, 0], [np.exp(300.0), 0, 1])
    np.testing.assert_allclose(importance.effective_samples(log_ratio[..., 0]), 1)
    assert importance.effective_samples(jnp.full((1, 3), -jnp.inf)) == 0


def far_apart(gap: float, dtype=jnp.float64) -> Scored:
    """Two groups of four completions of three tokens, of which the last does not count in half of them.

    Policy, reference, the older policy and the sampler are `gap` nats apart in each completion, in turn to both sides.
    """
    sides = jnp.array([[1.0, -1, 1, -1], [-1, -1, 1, 1]], dtype)
    mask = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]], dtype)[None].repeat(2, 0)
    logp = -1.5 - 0.1 * jnp.arange(24, dtype=dtype).reshape(2, 4, 3)
    ref = jnp.where(mask > 0, logp + sides[..., None] * gap / 2, 0)
    token = jnp.sum(ref * mask, axis=-1)
    return Scored(
        logp, mask, token, jnp.array([[1.0, 0, 1, 0.5], [1, 1, 0, 0]], dtype),
        jnp.array([[0, -1, 1, 2], [0, 1, -1, -1]]), jnp.log(jnp.array([[0.8, 0.2, 0.1], [0.5, 0.5, 0.1]], dtype)),
        ref_token_logp=ref, old_logp=logp - sides[..., None] * gap, sampler_logp=logp + sides[..., None] * gap,
        unseen_log_mass=jnp.full(2, -FAR, dtype), prompt_log_z=jnp.full(2, 3.0, dtype),
    )  # fmt: skip


def algorithms():
    """Every transform, every objective, and our own objective with every estimator, level, ratio and weight."""
    for transform in methods.TRANSFORMS:
        yield Algorithm(transform=transform)
    for transform, objective in itertools.product(("none", "mara_strings"), methods.OBJECTIVES):
        yield Algorithm(transform=transform, objective=objective)
    for transform in ("none", "mara_strings"):
        for estimator in (*kl.PLACED, "ratio", "reference_samples"):
            kind = "forward" if estimator in ("ratio", "reference_samples", "k3_in_loss") else "reverse"
            own = {"method": "vanilla", "transform": transform, "estimator": estimator, "kl": kind}
            yield Algorithm(**own)
            yield Algorithm(**own, importance="sequence", truncate=1e30)
            if estimator == "k1_in_reward" or estimator == "ratio":
                yield Algorithm(**own, importance="token", clip=0.2, truncate=2.0, truncate_level="token")
                yield Algorithm(**own, importance="length_normalised", baseline="group_normalised")
            elif estimator in kl.PLACED:
                yield Algorithm(**own, level="token")


FAR_APART = [(FAR, "float64"), pytest.param(100.0, "float32", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("gap", "dtype"), FAR_APART)
def test_every_loss_and_gradient_is_finite_a_thousand_nats_apart(gap, dtype):
    """In float32 a hundred nats, and the gradient's squared norm as well."""
    scored = far_apart(gap, jnp.dtype(dtype))
    for algorithm in algorithms():
        reads_samples = method_rules.reads_reference_samples(algorithm)

        def value(logp, algorithm=algorithm, reads_samples=reads_samples):
            other = far_apart(-gap, jnp.dtype(dtype))._replace(logp=logp) if reads_samples else None
            return method_rules.loss(algorithm, scored._replace(logp=logp), other, NUMBERS)

        (loss, metrics), gradient = jax.value_and_grad(value, has_aux=True)(scored.logp)
        assert np.isfinite(loss), algorithm
        assert np.isfinite(np.sum(np.square(gradient))) and gradient.dtype == dtype, algorithm
        assert all(np.isfinite(x) for x in metrics.values()), (algorithm, metrics)


def test_the_ratio_estimator_favours_the_sample_that_the_reference_prefers():
    """By hand: of two completions the reference prefers the first by 1,000 nats: it alone is made likelier."""
    logp = jnp.array([[[-2.0], [-2.0]]])

    def value(logp):
        ref = jnp.array([[FAR, -FAR]])
        mean = lambda x: x - x.mean(-1, keepdims=True)  # noqa: E731
        return objectives.forward_kl_ratio(logp, jnp.ones_like(logp), ref, jnp.zeros((1, 2)), beta=0.1, advantage=mean)[
            0
        ]

    np.testing.assert_allclose(jax.grad(value)(logp)[0, :, 0], np.array([-1, 1]) * 0.1 * np.exp(300.0) / 4)


@pytest.mark.parametrize("shift", [0.0, FAR, -FAR])
def test_the_optimum_on_samples_does_not_depend_on_how_small_all_weights_are(shift):
    """Beside weights this small a gap of rewards leaves everything to the best; beside weights as large, nothing."""
    weight = jnp.log(jnp.array([0.25, 0.75]))
    got = pooled_samples.optimum_log_mass(weight + shift, jnp.array([1.0, 0.0]), jnp.array([0, 1]), 2, 0.5, "forward")
    # beta sum w / (x + gap) = 1 with weights .25, .75, gaps 0, 1, beta .5: x^2 + x/2 - 1/8 = 0.
    x = (-0.5 + np.sqrt(0.75)) / 2
    want = {0.0: 0.5 * np.array([0.25 / x, 0.75 / (x + 1)]), FAR: np.array([0.25, 0.75]), -FAR: np.array([1.0, 0.0])}
    np.testing.assert_allclose(np.exp(got)[:2], want[shift], atol=1e-6)
