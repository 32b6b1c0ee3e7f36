"""Rivals of MARA against hand arithmetic, and their expected gradients by enumeration of strings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_policy

from mara_jax.audit import enumeration
from mara_jax.core import advantages, augment, kl, objectives, rival_rewards, rivals, targets

pytestmark = pytest.mark.usefixtures("x64")

BETA, THRESHOLD = 0.3, 0.4


class Case:
    """Fifteen strings of different lengths, a policy away from its reference, random rewards."""

    def __init__(self):
        self.strings = enumeration.strings(2)
        self.params = enumeration.random_logits(1)
        self.ref_logp = enumeration.string_logp(enumeration.random_logits(2), self.strings)
        self.reward = jnp.asarray(np.random.default_rng(3).uniform(size=len(self.ref_logp)))

    def gradient(self, objective):
        return jax.jit(jax.grad(lambda params: objective(enumeration.string_logp(params, self.strings))))(self.params)

    def expected_gradient(self, rival, group, **settings):
        def loss(logp, mask, index):
            return rival(logp, mask, self.ref_logp[index][None], self.reward[index][None], **settings)[0]

        return jax.jit(lambda params: small_policy.expected_gradient(loss, params, self.strings, group))(self.params)

    def kl_to_optimum(self):
        target = targets.reverse_kl(self.ref_logp, self.reward, BETA)
        return self.gradient(lambda logp: kl.reverse(logp, target))


@functools.cache
def case():
    return Case()


def batch(seed=0, prompts=2, group=4):
    """Random strings of one to three tokens: logp, mask, ref_logp of strings, reward."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(3) < rng.integers(1, 4, size=(prompts, group, 1))).astype(float)
    logp = -rng.exponential(size=(prompts, group, 3))
    return jnp.asarray(logp), jnp.asarray(mask), -rng.exponential(size=mask.shape[:2]), rng.uniform(size=mask.shape[:2])


# Squared losses.


@pytest.mark.parametrize("log_z", [0.0, 7.0])
def test_trajectory_balance_has_twice_the_gradient_of_the_kl_whatever_log_z(log_z):
    got = case().expected_gradient(rivals.trajectory_balance, 1, beta=BETA, log_z=log_z)
    assert small_policy.relative_error(got, 2 * case().kl_to_optimum()) < 1e-10


@pytest.mark.parametrize("group", [2, 3])
def test_vargrad_has_twice_the_gradient_of_the_kl_in_expectation(group):
    got = case().expected_gradient(rivals.vargrad, group, beta=BETA)
    assert small_policy.relative_error(got, 2 * case().kl_to_optimum()) < 1e-10


def test_reinvent_has_minus_two_sigma_the_gradient_of_the_objective():
    c, sigma = case(), 1 / BETA
    got = c.expected_gradient(rivals.reinvent, 1, sigma=sigma)
    objective = c.gradient(lambda logp: jnp.sum(jnp.exp(logp) * c.reward) - BETA * kl.reverse(logp, c.ref_logp))
    assert small_policy.relative_error(got, -2 * sigma * objective) < 1e-10


def test_squared_losses_are_policy_gradients_sample_by_sample():
    logp, mask, ref, reward = batch()

    def gradient(loss, **settings):
        return jax.grad(lambda logp: loss(logp, mask, ref, reward, beta=BETA, **settings)[0])(logp)

    rloo = gradient(objectives.reverse_kl, advantage=advantages.leave_one_out)
    np.testing.assert_allclose(gradient(rivals.vargrad), 2 / BETA * rloo, atol=1e-12)
    plain = gradient(objectives.reverse_kl, advantage=lambda x: x - BETA * 1.7)
    np.testing.assert_allclose(gradient(rivals.trajectory_balance, log_z=1.7), 2 / BETA * plain, atol=1e-12)
    same = rivals.trajectory_balance(logp, mask, ref, reward, beta=BETA, log_z=0.0)[0]
    np.testing.assert_allclose(rivals.reinvent(logp, mask, ref, reward, sigma=1 / BETA)[0], same, rtol=1e-12)


def test_trajectory_balance_vanishes_at_the_optimum_with_the_true_log_z_per_prompt():
    ref = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    reward = jnp.array([[1.0, 0.0], [0.2, 0.5]])
    log_z = jax.nn.logsumexp(ref + reward / BETA, axis=-1)
    logp = targets.reverse_kl(ref, reward, BETA)[..., None]
    loss, metrics = rivals.trajectory_balance(logp, jnp.ones_like(logp), ref, reward, beta=BETA, log_z=log_z)
    np.testing.assert_allclose(loss, 0, atol=1e-20)
    np.testing.assert_allclose(metrics["log_z/batch"], jnp.mean(log_z), rtol=1e-12)
    np.testing.assert_allclose(rivals.vargrad(logp, jnp.ones_like(logp), ref, reward, beta=BETA)[0], 0, atol=1e-20)


def test_mara_makes_the_augmented_likelihood_one_constant_on_the_good_molecules():
    sigma = 128.0
    ref, reward = np.array([[-30.0, -41.0, -55.0, -28.0]]), np.array([[0.9, 0.95, 0.86, 0.3]])
    augmented_reward, _ = augment.mara(reward, ref, beta=1 / sigma, threshold=0.85)
    likelihood = (ref + sigma * augmented_reward)[0]
    np.testing.assert_allclose(likelihood, [-30 + 128 * 0.9] * 3 + [-28 + 128 * 0.3], rtol=1e-12)


def test_a_group_of_one_has_no_variance():
    logp, mask, ref, reward = batch(group=1)
    with pytest.raises(ValueError, match="at least 2"):
        rivals.vargrad(logp, mask, ref, reward, beta=BETA)


# Likelihood.


def test_one_exact_raft_step_is_the_reference_restricted_to_the_good_set():
    # Twenty samples in the reference's own proportions .60 .30 .05 .05; the last outcome is bad.
    index = jnp.array([0] * 12 + [1] * 6 + [2] + [3])
    reward = jnp.array([1.0, 1.0, 1.0, 0.0])[index][None]

    def gradient(logits):
        def loss(logits):
            logp = jax.nn.log_softmax(logits)[index][None, :, None]
            return rivals.raft(logp, jnp.ones_like(logp), reward, threshold=0.5)[0]

        return jax.grad(loss)(logits)

    logits = jnp.array([0.3, -1.0, 0.5, 2.0])
    restricted = np.array([12, 6, 1, 0]) / 19
    np.testing.assert_allclose(gradient(logits), jax.nn.softmax(logits) - restricted, atol=1e-14)
    # Logits of the restricted reference, as near to it as they can be: nothing left to do.
    np.testing.assert_allclose(gradient(jnp.log(restricted + 1e-300)), 0, atol=1e-12)


def test_raft_leaves_a_prompt_without_good_samples_alone_and_best_of_n_shares_ties():
    logp = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))[..., None]
    mask = jnp.ones_like(logp)
    reward = jnp.array([[0.9, 0.1, 0.9], [0.3, 0.2, 0.1]])
    loss, metrics = rivals.raft(logp, mask, reward, threshold=0.8)
    np.testing.assert_allclose(loss, (np.log(2) + np.log(4)) / 2 / 2)
    np.testing.assert_allclose(metrics["kept/fraction"], 1 / 3)
    best, _ = rivals.best_of_n(logp, mask, reward)
    np.testing.assert_allclose(best, ((np.log(2) + np.log(4)) / 2 + np.log(10)) / 2)


@pytest.mark.parametrize("method", ["vanilla", "mara"])
def test_forward_kl_toward_the_optimum_has_gradient_p_minus_g(method):
    ref, reward = jnp.log(jnp.array([[0.6, 0.3, 0.05, 0.04, 0.01]])), jnp.array([[1.0, 1.0, 1.0, 0.0, 0.0]])
    target = targets.reverse_kl(ref, reward, BETA)
    if method == "mara":
        target = targets.mara(ref, reward, BETA, 0.8)
        reward, ref = augment.mara(reward, ref, beta=BETA, threshold=0.8)

    def loss(logits):
        # Every outcome once: samples of the uniform distribution, without noise.
        logp = jax.nn.log_softmax(logits)[None, :, None]
        uniform = jnp.zeros((1, 5))
        return rivals.forward_kl_to_target(logp, jnp.ones_like(logp), ref, reward, beta=BETA, sample_logp_pg=uniform)[0]

    logits = jnp.array([0.4, -1.0, 2.0, 0.1, 0.0])
    np.testing.assert_allclose(jax.grad(loss)(logits), jax.nn.softmax(logits) - jnp.exp(target[0]), atol=1e-14)


def test_forward_kl_toward_the_optimum_divides_by_the_policy_that_drew():
    logp = jnp.log(jnp.array([[0.5, 0.125]]))[..., None]
    ref, reward = jnp.log(jnp.array([[0.25, 0.25]])), jnp.array([[0.0, BETA * np.log(2)]])
    loss, metrics = rivals.forward_kl_to_target(logp, jnp.ones_like(logp), ref, reward, beta=BETA)
    # Weights .25/.5 and .25 * 2/.125, that is 1/2 and 4: shares 1/9 and 8/9.
    np.testing.assert_allclose(loss, np.log(2) / 9 + 8 * np.log(8) / 9)
    np.testing.assert_allclose(metrics["weights/effective_samples"], 4.5**2 / 16.25)


# GRPO.


def test_grpo_by_hand():
    # Two strings, of one and two tokens; advantages +-1/sqrt 2 (reward 1 and 0, deviation sqrt .5 + 1e-4).
    logp = jnp.log(jnp.array([[[0.5, 0.9], [0.4, 0.1]]]))
    mask = jnp.array([[[1, 0], [1, 1]]])
    old = jnp.log(jnp.array([[[0.25, 0.9], [0.5, 0.1]]]))
    ref = jnp.log(jnp.array([[[0.5, 0.3], [0.4, 0.2]]]))
    reward = jnp.array([[1.0, 0.0]])
    a = 0.5 / (np.sqrt(0.5) + 1e-4)
    k3 = 2 - 1 - np.log(2)  # the last token: ref is twice pi
    # Ratio 2 on a gain is cut to 1.2; ratio .8 on a loss stands at the edge; ratio 1.
    first, second = 1.2 * a, (-0.8 * a) + (-a - 0.3 * k3)
    loss, metrics = rivals.grpo(logp, mask, old, ref, reward, beta=0.3)
    np.testing.assert_allclose(loss, -(first + second / 2) / 2, rtol=1e-12)
    np.testing.assert_allclose(metrics["kl/k3"], k3 / 3, rtol=1e-12)
    np.testing.assert_allclose(metrics["clipped_fraction"], 1 / 3)
    # Dr. GRPO: advantages +-1/2, sums instead of means.
    first, second = 1.2 * 0.5, -0.8 * 0.5 - 0.5 - 0.3 * k3
    loss, _ = rivals.dr_grpo(logp, mask, old, ref, reward, beta=0.3)
    np.testing.assert_allclose(loss, -(first + second) / 2, rtol=1e-12)


def test_dapo_clips_higher_above_and_divides_by_the_tokens_of_the_batch():
    # Ratios 1.25 (within .28), 1.5 (cut to 1.28) on a gain; .5 (cut to .8) on a loss; five tokens, two of a group of
    # equal rewards.
    old = jnp.log(jnp.array([[[0.4, 0.2], [0.8, 0.3]], [[0.5, 0.5], [0.5, 0.5]]]))
    logp = jnp.log(jnp.array([[[0.5, 0.3], [0.4, 0.1]], [[0.1, 0.2], [0.3, 0.4]]]))
    mask = jnp.array([[[1, 1], [1, 0]], [[1, 0], [1, 0]]])
    a = 0.5 / (np.sqrt(0.5) + 1e-4)
    loss, metrics = rivals.dapo(logp, mask, old, jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(loss, -(1.25 * a + 1.28 * a - 0.8 * a) / 5, rtol=1e-12)
    np.testing.assert_allclose(metrics["clipped_fraction"], 2 / 5)


def test_what_the_clip_binds_has_no_gradient_but_its_penalty():
    logp, old = jnp.log(jnp.array([[[0.5], [0.1]]])), jnp.log(jnp.array([[[0.25], [0.25]]]))
    mask, reward = jnp.ones_like(logp), jnp.array([[1.0, 0.0]])

    def loss(logp, ref, beta):
        return rivals.grpo(logp, mask, old, ref, reward, beta=beta)[0]

    # A gain at ratio 2 and a loss at ratio .4 are both past the clip; the gradient of k3 is 1 - ref/pi.
    np.testing.assert_array_equal(jax.grad(loss)(logp, logp, 0.0), 0)
    ref = logp + jnp.log(3.0)
    np.testing.assert_allclose(jax.grad(loss)(logp, ref, 0.5)[0, :, 0], 0.5 * (1 - 3) / 2 * np.ones(2), rtol=1e-12)


def test_masked_positions_may_hold_anything():
    logp, mask, _, reward = batch()
    ref = logp - 0.1

    def loss(logp, filling):
        filled, filled_ref = jnp.where(mask > 0, logp, filling), jnp.where(mask > 0, ref, filling)
        settings = filled, mask, jax.lax.stop_gradient(filled), filled_ref, reward
        return rivals.grpo(*settings, beta=0.1)[0] + rivals.dr_grpo(*settings, beta=0.1)[0]

    clean, dirty = (jax.grad(loss)(logp, filling) for filling in (0.0, jnp.nan))
    assert np.isfinite(clean).all() and np.any(clean != 0)
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_dividing_by_the_deviation_is_a_slope_in_the_probability_of_success(group):
    single = enumeration.outcomes(4)
    logits = jnp.array([[0.3, -1.0, 0.5, 1.2]])
    reward = jnp.array([1.0, 0.0, 1.0, 0.0])

    def loss(logp, mask, index):
        advantage = advantages.group_normalised(reward[index][None])
        return -jnp.mean(advantage * objectives.sequence_logp(logp, mask))

    def success(logits):
        return jnp.sum(jax.nn.softmax(logits[0]) * reward)

    got = -jax.jit(lambda x: small_policy.expected_gradient(loss, x, single, group))(logits)
    want = rivals.group_std_slope(success(logits), group) * jax.grad(success)(logits)
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_known_slopes():
    success = jnp.array([0.0, 0.1, 0.5, 0.9])
    np.testing.assert_allclose(rivals.group_std_slope(success, 2), 1 / np.sqrt(2), rtol=2e-4)
    np.testing.assert_allclose(rivals.group_std_slope(success, 3), 2 / np.sqrt(3), rtol=2e-4)
    # Four: 1.5 at both ends, (2 * 1.5 + 3 * .5/sqrt(1/3)) / 4 in the middle.
    np.testing.assert_allclose(rivals.group_std_slope(0.5, 4), (3 + 1.5 * np.sqrt(3)) / 4, rtol=2e-4)
    np.testing.assert_allclose(rivals.group_std_slope(0.3, 400), 1 / np.sqrt(0.3 * 0.7), rtol=5e-3)


# Rewards.


def test_unlikeliness_ranks_by_hand():
    reward = jnp.array([[1.0, 1.0, 2.0, 0.0]])
    mean_logp = jnp.array([[-1.0, -3.0, -2.0, -0.5]])
    # Ranks 2, 0, 1, 3 of four; the penalty is a quarter of rank / 4.
    want = [[1 - 0.125, 1.0, 2 * (1 - 0.0625), 0.0]]
    np.testing.assert_allclose(rival_rewards.unlikeliness(reward, mean_logp), want, rtol=1e-14)
    np.testing.assert_allclose(rival_rewards.unlikeliness(reward, jnp.zeros((1, 4)))[0], [1, 0.9375, 1.75, 0])


def test_darling_with_known_classes_by_hand():
    reward = jnp.array([[1.0, 2.0, 1.0, 1.0, 0.0], [1.0] * 5])
    answer = jnp.array([[7, 7, 7, 2, -1], [3] * 5])
    want = [[2 / 4, 2 * 2 / 4, 2 / 4, 1.0, 0.0], [0.1] * 5]
    np.testing.assert_allclose(rival_rewards.darling(reward, answer), want, rtol=1e-14)


def test_inverse_probability_by_hand():
    reward, answer = jnp.array([[1.0, 2.0, 1.0, 3.0]]), jnp.array([[5, 5, 5, 0]])
    np.testing.assert_allclose(rival_rewards.inverse_probability(reward, answer), [[4 / 3, 8 / 3, 4 / 3, 12.0]])


def test_an_entropy_bonus_in_the_reward_adds_the_entropy_of_whole_strings():
    c, eta = case(), 0.2

    def rival(logp, mask, ref, reward):
        reward = rival_rewards.entropy_bonus(reward, objectives.sequence_logp(logp, mask), eta=eta)
        return objectives.reverse_kl(logp, mask, ref, reward, beta=BETA, advantage=advantages.leave_one_out)

    def objective(logp):
        p = jnp.exp(logp)
        return jnp.sum(p * c.reward) - BETA * kl.reverse(logp, c.ref_logp) - eta * jnp.sum(p * logp)

    assert small_policy.relative_error(-c.expected_gradient(rival, 2), c.gradient(objective)) < 1e-10
    optimum = rival_rewards.entropy_bonus_optimum(c.ref_logp, c.reward, BETA, eta)
    want = np.exp(c.ref_logp) ** (BETA / (BETA + eta)) * np.exp(c.reward / (BETA + eta))
    np.testing.assert_allclose(jnp.exp(optimum), want / want.sum(), rtol=1e-12)


def test_rewards_of_another_shape_are_refused():
    logp, mask, ref, reward = batch()
    for loss in (
        lambda: rivals.grpo(logp, mask, logp, logp, reward[0], beta=0.1),
        lambda: rivals.raft(logp, mask, reward[0], threshold=0.5),
        lambda: rivals.reinvent(logp, mask, ref, reward[0], sigma=1.0),
        lambda: rivals.forward_kl_to_target(logp, mask, ref[0], reward, beta=0.1),
    ):
        with pytest.raises(ValueError, match="shape"):
            loss()
