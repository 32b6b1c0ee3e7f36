"""Reward augmentation by hand, and against the optima that the augmented objective must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from mara_jax.core import augment, kl, targets

pytestmark = pytest.mark.usefixtures("x64")

REWARD = np.array([[1.0, 0.9, 0.2, 1.0], [0.1, 0.2, 0.3, 0.4]])
REF_LOGP = np.array([[-3.0, -1.0, -0.5, -7.0], [-1.0, -2.0, -3.0, -4.0]])
ANSWER = np.array([[0, 1, 1, -1], [0, 1, 0, 1]])
SETTINGS = {"beta": 0.1, "threshold": 0.8}


def test_algorithm_1_by_hand():
    reward, ref_logp = augment.mara(REWARD, REF_LOGP, **SETTINGS)
    # Anchor: sample 1 (reward .9, log ref -1), not the likelier but bad sample 2. The second row has nothing
    # good.
    np.testing.assert_allclose(reward, [[0.9 + 0.1 * 2, 0.9, 0.2, 0.9 + 0.1 * 6], REWARD[1]])
    np.testing.assert_array_equal(ref_logp, REF_LOGP)


def test_algorithm_2_by_hand():
    reward, ref_logp = augment.mara(REWARD, REF_LOGP, direction="forward", **SETTINGS)
    np.testing.assert_allclose(reward, [[0.9, 0.9, 0.2, 0.9], REWARD[1]])
    np.testing.assert_allclose(ref_logp, [[-1, -1, -0.5, -1], REF_LOGP[1]])


@pytest.mark.parametrize("anchor_reward, anchor_ref_logp", [(0.95, -0.2), (np.array([0.95, 2]), np.array([-0.2, -9]))])
def test_a_given_anchor_replaces_the_batchs(anchor_reward, anchor_ref_logp):
    given = {"anchor_reward": anchor_reward, "anchor_ref_logp": anchor_ref_logp}
    reward, _ = augment.mara(REWARD, REF_LOGP, **SETTINGS, **given)
    np.testing.assert_allclose(reward, [[0.95 + 0.28, 0.95 + 0.08, 0.2, 0.95 + 0.68], REWARD[1]])
    reward, ref_logp = augment.mara(REWARD, REF_LOGP, direction="forward", **SETTINGS, **given)
    np.testing.assert_allclose(reward, [[0.95, 0.95, 0.2, 0.95], REWARD[1]])
    np.testing.assert_allclose(ref_logp, [[-0.2, -0.2, -0.5, -0.2], REF_LOGP[1]])


def test_half_an_anchor_and_unknown_directions_are_refused():
    with pytest.raises(ValueError, match="both"):
        augment.mara(REWARD, REF_LOGP, **SETTINGS, anchor_reward=1.0)
    with pytest.raises(ValueError, match="sideways"):
        augment.mara(REWARD, REF_LOGP, **SETTINGS, direction="sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sideways"):
        augment.answer_log_mass(REWARD, ANSWER, 2, 0.1, 0.8, "sideways")  # type: ignore[arg-type]


def test_a_sample_alone_in_its_group_is_its_own_anchor():
    for direction in ("reverse", "forward"):
        reward, ref_logp = augment.mara(REWARD.reshape(-1, 1), REF_LOGP.reshape(-1, 1), direction=direction, **SETTINGS)
        np.testing.assert_allclose(reward, REWARD.reshape(-1, 1))
        np.testing.assert_allclose(ref_logp, REF_LOGP.reshape(-1, 1))


def test_on_good_samples_the_reference_cancels_out_of_the_signal():
    rng = np.random.default_rng(0)
    reward, ref_logp, logp = (
        rng.uniform(size=(50, 8)),
        -90 * rng.uniform(size=(50, 8)),
        -50 * rng.uniform(size=(50, 8)),
    )
    good = reward >= 0.5
    augmented, ref = augment.mara(reward, ref_logp, beta=0.3, threshold=0.5)
    signal = augmented - 0.3 * (logp - ref)
    z = np.argmax(np.where(good, ref_logp, -np.inf), -1)[:, None]
    flat = np.take_along_axis(reward + 0.3 * ref_logp, z, -1) - 0.3 * logp
    np.testing.assert_allclose(signal[good], np.broadcast_to(flat, signal.shape)[good], rtol=1e-12)
    # Both algorithms give this same signal.
    augmented, ref = augment.mara(reward, ref_logp, beta=0.3, threshold=0.5, direction="forward")
    np.testing.assert_allclose(augmented - 0.3 * (logp - ref), signal, rtol=1e-12)


def test_a_good_sample_that_the_reference_excludes_keeps_a_finite_balanced_signal():
    ref_logp, logp = np.array([[-1.0, -np.inf, -np.inf]]), -2.0
    reward, ref = augment.mara(np.array([[1.0, 1.0, 0.0]]), ref_logp, **SETTINGS)
    signal = reward - 0.1 * (logp - ref)
    np.testing.assert_allclose(signal[0, :2], 1 + 0.1 * (-1 + 2))
    assert signal[0, 2] == -np.inf  # a bad one stays excluded
    reward, _ = augment.mara(np.ones((1, 2)), np.full((1, 2), -np.inf), **SETTINGS)
    np.testing.assert_array_equal(reward, 1)  # no anchor that the reference reaches


def enumerated(seed=4, size=20):
    rng = np.random.default_rng(seed)
    reward = np.where(rng.uniform(size=size) < 0.6, rng.uniform(0.8, 1.0, size=size), 0.3)
    return special.log_softmax(2 * rng.normal(size=size)), reward, rng.integers(-1, 3, size=size)


@pytest.mark.parametrize("beta", [0.02, 0.3])
def test_over_every_outcome_at_once_the_augmented_optimum_is_maras(beta):
    ref_logp, reward, _ = enumerated()
    for direction, optimum in (("reverse", targets.reverse_kl), ("forward", targets.forward_kl)):
        augmented, ref_hat = augment.mara(reward[None], ref_logp[None], beta=beta, threshold=0.8, direction=direction)
        want = targets.mara(ref_logp, reward, beta, 0.8, direction)
        np.testing.assert_allclose(optimum(ref_hat[0], augmented[0], beta), want, atol=1e-9)


@pytest.mark.parametrize("beta", [0.02, 0.3])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_over_every_outcome_at_once_the_answers_optimum_is_its_target(beta, direction):
    ref_logp, reward, answer = enumerated()
    member = ((reward >= 0.8)[:, None]) & (answer[:, None] == np.arange(3))
    weight = ref_logp + reward / beta if direction == "reverse" else ref_logp
    log_mass = special.logsumexp(np.where(member, weight[:, None], -np.inf), axis=0)
    augmented, ref_hat = augment.mara_answers(
        reward[None],
        ref_logp[None],
        answer[None],
        log_mass[None],
        beta=beta,
        threshold=0.8,
        direction=direction,
    )
    optimum = targets.reverse_kl if direction == "reverse" else targets.forward_kl
    want = targets.mara_answers(ref_logp, reward, answer, beta, 0.8, direction)
    np.testing.assert_allclose(optimum(ref_hat[0], augmented[0], beta), want, atol=1e-9)


def test_answers_by_hand():
    log_mass = np.log([[0.6, 0.2], [0.1, 0.9]])
    reward, ref_logp = augment.mara_answers(REWARD, REF_LOGP, ANSWER, log_mass, **SETTINGS)
    # Row 0: class 0 is the anchor; class 1 gets .1 log 3; the bad sample and the one without an answer get
    # nothing.
    np.testing.assert_allclose(reward, [[1.0, 0.9 + 0.1 * np.log(3), 0.2, 1.0], REWARD[1]])
    np.testing.assert_array_equal(ref_logp, REF_LOGP)
    reward, ref_logp = augment.mara_answers(REWARD, REF_LOGP, ANSWER, log_mass, direction="forward", **SETTINGS)
    np.testing.assert_allclose(reward, [[1.0, 1.0, 0.2, 1.0], REWARD[1]])
    np.testing.assert_allclose(ref_logp, [[-3, -1 + np.log(3), -0.5, -7], REF_LOGP[1]])
    reward, _ = augment.mara_answers(
        REWARD, REF_LOGP, ANSWER, log_mass, direction="forward", anchor_reward=0.97, **SETTINGS
    )
    np.testing.assert_allclose(reward, [[0.97, 0.97, 0.2, 1.0], REWARD[1]])


def test_a_row_without_the_anchor_class_takes_the_reward_of_its_likeliest_good_sample():
    reward, _ = augment.mara_answers(
        np.array([[0.9, 1.0]]), np.array([[-4.0, -2.0]]), np.array([[1, 1]]), np.log([[0.6, 0.2]]),
        direction="forward", **SETTINGS,
    )  # fmt: skip
    np.testing.assert_allclose(reward, 1.0)


def test_an_answer_not_among_the_samples_counts_as_half_a_sample():
    """Four samples: two of class 0, one good and one bad of class 1; classes 2 and 3 are never seen."""
    reward, answer = np.array([[1.0, 1.0, 0.9, 0.2]]), np.array([[0, 0, 1, 1]])
    log_mass = augment.answer_log_mass(reward, answer, 4, 0.1, 0.8)
    unseen = augment.unseen_log_mass(reward, 0.1, 0.8)
    np.testing.assert_allclose(unseen, [np.log(0.5 / 4) + 10])  # the largest good reward is 1: exp(1 / .1)
    sample = np.ones((1, 4)), np.zeros((1, 4)), np.array([[0, 1, 2, -1]])
    got, _ = augment.mara_answers(*sample, log_mass, unseen_log_mass=unseen, **SETTINGS)
    # Class 0 is the anchor with 2 exp(10) / 4; class 1 has exp(9) / 4; half a sample is a quarter of two.
    np.testing.assert_allclose(got, [[1, 1 + 0.1 * (np.log(2) + 1), 1 + 0.1 * np.log(4), 1]])
    settings = SETTINGS | {"direction": "forward"}
    log_mass = augment.answer_log_mass(reward, answer, 4, 0.1, 0.8, "forward")
    unseen = augment.unseen_log_mass(reward, 0.1, 0.8, "forward")
    np.testing.assert_allclose(unseen, [np.log(1 / 8)])
    _, ref = augment.mara_answers(*sample, log_mass, unseen_log_mass=unseen, **settings)
    np.testing.assert_allclose(ref, [[0, np.log(2), np.log(4), 0]], atol=1e-12)


def test_without_a_good_sample_half_a_sample_has_the_threshold_as_reward():
    got = augment.unseen_log_mass(np.array([[0.1, 0.7], [0.1, 0.9]]), 0.1, 0.8)
    np.testing.assert_allclose(got, [np.log(0.25) + 8, np.log(0.25) + 9])
    with pytest.raises(ValueError, match="sideways"):
        augment.unseen_log_mass(REWARD, 0.1, 0.8, "sideways")  # type: ignore[arg-type]


def test_the_mass_of_unseen_classes_is_one_number_one_a_row_or_half_of_the_smallest_seen():
    log_mass = np.array([[-1.0, -np.inf, -20.0], [-3.0, -np.inf, -2.0]])
    sample = np.ones((2, 3)), np.zeros((2, 3)), np.array([[0, 1, 2], [0, 1, 2]])
    for unseen, bonus in ((None, [19 + np.log(2), 1 + np.log(2)]), (-4.0, [3, 2]), (np.array([-4, -5]), [3, 3])):
        reward, _ = augment.mara_answers(*sample, log_mass, unseen_log_mass=unseen, **SETTINGS)
        np.testing.assert_allclose(reward, 1 + 0.1 * np.array([[0, bonus[0], 19], [1, bonus[1], 0]]))
    for direction in ("reverse", "forward"):
        for unseen in (None, -2.0):
            settings = SETTINGS | {"direction": direction, "unseen_log_mass": unseen}
            reward, ref = augment.mara_answers(*sample, np.full((2, 3), -np.inf), **settings)
            np.testing.assert_array_equal(reward, 1)  # nothing known of this prompt: unchanged
            np.testing.assert_array_equal(ref, 0)


def test_log_masses_by_hand():
    reward = np.array([[1.0, 1.0, 0.9, 0.2, 1.0, 1.0, 1.0, 1.0]])
    answer = np.array([[0, 1, 0, 0, -1, 0, 1, 0]])
    forward = augment.answer_log_mass(reward, answer, 3, 0.1, 0.8, "forward")
    np.testing.assert_allclose(forward, [[np.log(4 / 8), np.log(2 / 8), -np.inf]])
    reverse = augment.answer_log_mass(reward, answer, 3, 0.1, 0.8)
    want = [np.log((3 * np.exp(10) + np.exp(9)) / 8), np.log(2 * np.exp(10) / 8), -np.inf]
    np.testing.assert_allclose(reverse, [want])
    # Rows are prompts, and classes of far smaller mass keep their digits.
    many = augment.answer_log_mass(np.array([[1.0, 2.0], [5.0, 5.0]]), np.array([[0, 2], [-1, 1]]), 3, 1e-3, 0.8)
    half = np.log(0.5)
    np.testing.assert_allclose(many, [[1000 + half, -np.inf, 2000 + half], [-np.inf, 5000 + half, -np.inf]])
    share, low, high = augment.answer_shares(reward, answer, 3, 0.8)
    np.testing.assert_allclose(share, [[0.5, 0.25, 0]])
    for a, count in enumerate((4, 2, 0)):
        interval = stats.binomtest(count, 8).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose((low[0, a], high[0, a]), interval, atol=1e-9)


def test_wilson_covers_and_estimates_converge():
    rng = np.random.default_rng(2)
    low, high = augment.wilson_interval(jnp.asarray(rng.binomial(256, 0.08, size=4000)), 256, 0.9)
    covered = np.mean((low <= 0.08) & (high >= 0.08))
    assert 0.87 < covered < 0.93
    # Log-masses from samples of an enumerated reference tend to those of the enumeration.
    ref_logp, reward, answer = enumerated()
    drawn = rng.choice(20, size=(1, 200_000), p=np.exp(ref_logp))
    for direction in ("reverse", "forward"):
        weight = ref_logp + (reward / 0.3 if direction == "reverse" else 0)
        exact = [special.logsumexp(weight[(reward >= 0.8) & (answer == a)]) for a in range(3)]
        got = augment.answer_log_mass(reward[drawn], answer[drawn], 3, 0.3, 0.8, direction)[0]
        np.testing.assert_allclose(got, exact, atol=0.05)


def test_under_jit_vmap_and_in_float32():
    many = jax.jit(jax.vmap(lambda beta: augment.mara(REWARD, REF_LOGP, beta=beta, threshold=0.8)[0]))
    betas = np.array([0.1, 0.5])
    for i, beta in enumerate(betas):
        np.testing.assert_allclose(many(betas)[i], augment.mara(REWARD, REF_LOGP, beta=beta, threshold=0.8)[0])
    with jax.enable_x64(False):
        reward, _ = augment.mara(REWARD, REF_LOGP, **SETTINGS)
        assert reward.dtype == jnp.float32
        # 0.8 as float32 is not 0.8: a threshold equal to the reward still counts as good.
        reward, _ = augment.mara(np.array([[0.8, 0.8]]), np.array([[-1.0, -2.0]]), **SETTINGS)
        np.testing.assert_allclose(reward, [[0.8, 0.9]], rtol=1e-6)


def test_of_equally_likely_good_outcomes_the_best_rewarded_is_the_anchor():
    """Whatever their order, in the batch and over the whole set, both directions."""
    ref_logp, reward = np.log([0.3, 0.3, 0.3, 0.1]), np.array([0.6, 1.0, 0.8, 0.2])
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 2, 0]):
        for direction in ("reverse", "forward"):
            got, ref = augment.mara(
                reward[order][None], ref_logp[order][None], beta=0.1, threshold=0.5, direction=direction
            )
            np.testing.assert_allclose(got[0], np.array([1.0, 1.0, 1.0, 0.2])[order], rtol=1e-6)
            np.testing.assert_allclose(ref[0], ref_logp[order], rtol=1e-6)
        weight = np.array([0.3 * np.exp(10.0)] * 3 + [0.1 * np.exp(2.0)])
        want = (weight / weight.sum())[order]
        np.testing.assert_allclose(np.exp(targets.mara(ref_logp[order], reward[order], 0.1, 0.5)), want, rtol=1e-5)


def test_arrays_that_do_not_fit_are_refused():
    """Broadcasting would give every prompt the references of one."""
    reward, ref_logp, answer = np.ones((3, 4)), np.zeros((3, 4)), np.zeros((3, 4), int)
    known = {"beta": 0.1, "threshold": 0.5}
    with pytest.raises(AssertionError, match="different shapes"):
        augment.mara(reward, ref_logp[:1], **known)
    with pytest.raises(AssertionError, match="different shapes"):
        augment.mara_answers(reward, ref_logp, answer[0], np.zeros((3, 2)), **known)
    with pytest.raises(AssertionError, match="rank"):
        augment.mara_answers(reward, ref_logp, answer, np.zeros(2), **known)
    for optimum in (targets.reverse_kl, targets.forward_kl):
        with pytest.raises(AssertionError, match="suffix"):
            optimum(np.zeros(4), np.ones((3, 1)), 0.1)
    with pytest.raises(AssertionError, match="suffix"):
        kl.forward(np.zeros(4), np.zeros((3, 1)))
