"""KLs, their estimators and baselines against closed forms and hand arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.core import advantages, kl

pytestmark = pytest.mark.usefixtures("x64")


def test_exact_kls_by_hand():
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    reverse = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    forward = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    np.testing.assert_allclose(kl.reverse(p, q), [reverse, 0], atol=1e-15)
    np.testing.assert_allclose(kl.forward(p, q), [forward, 0], atol=1e-15)


def test_zero_probabilities():
    with np.errstate(divide="ignore"):
        p, q = np.log([0.5, 0.5, 0.0]), np.log([0.25, 0.25, 0.5])
    np.testing.assert_allclose(kl.reverse(p, q), np.log(2))
    assert kl.forward(p, q) == np.inf and kl.reverse(q, p) == np.inf
    gradient = jax.grad(lambda logits: kl.reverse(jax.nn.log_softmax(logits), q))(jnp.array([0.0, 0.0, -jnp.inf]))
    np.testing.assert_allclose(gradient, 0, atol=1e-15)  # p is half of q on both: equal log-ratios


def test_estimators_by_hand_and_in_the_mean():
    np.testing.assert_allclose(kl.k1(np.log(0.5), np.log(0.25)), np.log(2))
    np.testing.assert_allclose(kl.k2(np.log(0.5), np.log(0.25)), np.log(2) ** 2 / 2)
    np.testing.assert_allclose(kl.k3(np.log(0.5), np.log(0.25)), 0.5 - 1 + np.log(2))
    rng = np.random.default_rng(0)
    logp, ref = jax.nn.log_softmax(rng.normal(size=7)), jax.nn.log_softmax(rng.normal(size=7))
    for estimator in (kl.k1, kl.k3):
        np.testing.assert_allclose(jnp.sum(jnp.exp(logp) * estimator(logp, ref)), kl.reverse(logp, ref))
    assert np.all(kl.k2(logp, ref) >= 0) and np.all(kl.k3(logp, ref) >= 0)


def test_k3_keeps_its_digits_near_zero():
    with jax.enable_x64(False):
        got = kl.k3(jnp.float32(1e-3), jnp.float32(0))
    np.testing.assert_allclose(got, np.expm1(-1e-3) + 1e-3, rtol=1e-3)


def test_baselines_by_hand():
    reward = jnp.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    np.testing.assert_array_equal(advantages.none(reward), reward)
    np.testing.assert_allclose(advantages.mean(reward), [[-2, -1, 3], [0, 0, 0]])
    np.testing.assert_allclose(advantages.leave_one_out(reward), [[-3, -1.5, 4.5], [0, 0, 0]])
    # The sample's deviation of 1, 2, 6 is sqrt(7).
    np.testing.assert_allclose(advantages.group_normalised(reward)[0], np.array([-2, -1, 3]) / np.sqrt(7), rtol=1e-4)
    np.testing.assert_array_equal(advantages.group_normalised(reward)[1], 0)
    assert set(advantages.BY_NAME) == {"none", "mean", "leave_one_out", "group_normalised"}


def test_leave_one_out_is_the_sample_less_the_mean_of_the_others():
    reward = np.random.default_rng(1).normal(size=(4, 5))
    want = [[row[i] - np.delete(row, i).mean() for i in range(5)] for row in reward]
    np.testing.assert_allclose(advantages.leave_one_out(jnp.asarray(reward)), want)


@pytest.mark.parametrize("name", ["leave_one_out", "group_normalised"])
def test_groups_of_one_are_refused_where_they_have_no_meaning(name):
    with pytest.raises(ValueError, match="not 1"):
        advantages.BY_NAME[name](jnp.ones((3, 1)))


def test_advantages_of_maxrl_and_pass_at_k_by_hand():
    reward = jnp.array([[1.0, 0, 0, 1], [0, 0, 0, 0], [0.2, 0.9, 0.5, 0.9], [0.2, 0.9, 0.5, 0.6]])
    np.testing.assert_allclose(advantages.mean_normalised(reward)[:2], [[1, -1, -1, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(advantages.mean_normalised(reward)[3, 0], (0.2 - 0.55) / 0.55)
    want = [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0.3, 0, 0],
    ]  # in two groups the best is not unique
    np.testing.assert_allclose(advantages.best_minus_second(reward), want, atol=1e-15)
    with pytest.raises(ValueError, match="at least 2 samples"):
        advantages.best_minus_second(reward[:, :1])
