"""Expected gradients of every objective against those of what it claims to optimise, by enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_policy

from mara_jax.audit import enumeration
from mara_jax.core import advantages, augment, kl, objectives, targets

pytestmark = pytest.mark.usefixtures("x64")

BETA, THRESHOLD = 0.3, 0.4
# What each baseline multiplies the expected gradient by, for a group of g.
BASELINES = {"none": lambda g: 1.0, "mean": lambda g: (g - 1) / g, "leave_one_out": lambda g: 1.0}
CASES = [("none", 1), ("none", 2), ("mean", 2), ("mean", 3), ("leave_one_out", 2), ("leave_one_out", 3)]
ENDS = [None, 2]


class Case:
    """A policy, a reference and rewards over all strings."""

    def __init__(self, end):
        self.strings = enumeration.strings(end)
        self.params = enumeration.random_logits(1)
        self.ref_logp = enumeration.string_logp(enumeration.random_logits(2), self.strings)
        rng = np.random.default_rng(3)
        self.reward = jnp.asarray(rng.uniform(size=len(self.ref_logp)))
        self.answer = jnp.asarray(rng.integers(0, 3, size=len(self.ref_logp)))

    def gradient(self, objective):
        """Gradient of objective(logp of all strings)."""

        def of_params(params):
            return objective(enumeration.string_logp(params, self.strings))

        return jax.jit(jax.grad(of_params))(self.params)

    def expected_gradient(self, loss, group):
        """Of minus the loss, over all groups."""
        return -jax.jit(lambda params: small_policy.expected_gradient(loss, params, self.strings, group))(self.params)


@functools.cache
def case(end):
    return Case(end)


def reverse_objective(c, reward, ref_logp, beta=BETA):
    return lambda logp: jnp.sum(jnp.exp(logp) * reward) - beta * kl.reverse(logp, ref_logp)


def forward_objective(c, reward, ref_logp, beta=BETA):
    return lambda logp: jnp.sum(jnp.exp(logp) * reward) + beta * jnp.sum(jnp.exp(ref_logp) * logp)


def test_the_strings_of_both_variants_are_complete():
    for end, count in ((None, 27), (2, 15)):
        c = case(end)
        assert len(c.ref_logp) == count
        np.testing.assert_allclose(jnp.sum(jnp.exp(c.ref_logp)), 1, rtol=1e-12)
    assert not case(2).strings.mask.all()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("baseline, group", CASES)
def test_reverse_kl_has_the_gradient_of_the_sequence_level_objective(end, baseline, group):
    c = case(end)

    def loss(logp, mask, index):
        return objectives.reverse_kl(
            logp, mask, c.ref_logp[index][None], c.reward[index][None],
            beta=BETA, advantage=advantages.BY_NAME[baseline],
        )[0]  # fmt: skip

    got = c.expected_gradient(loss, group)
    want = c.gradient(reverse_objective(c, c.reward, c.ref_logp)) * BASELINES[baseline](group)
    assert small_policy.relative_error(got, want) < 1e-10


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("baseline, group", CASES)
def test_forward_kl_by_ratio_has_the_gradient_of_its_objective(end, baseline, group):
    c = case(end)

    def loss(logp, mask, index):
        return objectives.forward_kl_ratio(
            logp, mask, c.ref_logp[index][None], c.reward[index][None],
            beta=BETA, advantage=advantages.BY_NAME[baseline],
        )[0]  # fmt: skip

    got = c.expected_gradient(loss, group)
    want = c.gradient(forward_objective(c, c.reward, c.ref_logp)) * BASELINES[baseline](group)
    assert small_policy.relative_error(got, want) < 1e-10


def expected_forward_samples(c, baseline, group, reward, ref_hat):
    """Expectation over groups of the policy and over single strings of the reference."""
    weight = jnp.exp(ref_hat - c.ref_logp)

    mask_nt = jnp.asarray(c.strings.mask)

    def loss(logp_nt, index):
        def one(ref_index):
            return objectives.forward_kl_samples(
                logp_nt[index][None], mask_nt[index][None], reward[index][None],
                logp_nt[ref_index][None, None], mask_nt[ref_index][None, None],
                weight[ref_index][None, None], beta=BETA, advantage=advantages.BY_NAME[baseline],
            )[0]  # fmt: skip

        return jnp.sum(jnp.exp(c.ref_logp) * jax.vmap(one)(jnp.arange(len(c.ref_logp))))

    groups = enumeration.groups(len(c.ref_logp), group)
    return -jax.jit(lambda params: enumeration.expected_gradient(loss, params, c.strings, groups))(c.params)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("baseline, group", CASES[:3] + CASES[4:5])
def test_forward_kl_by_reference_samples_has_the_gradient_of_its_objective(end, baseline, group):
    c = case(end)
    got = expected_forward_samples(c, baseline, group, c.reward, c.ref_logp)
    # The mean baseline shrinks the reward's part alone: the objective is that of a larger beta, as
    # documented.
    factor = BASELINES[baseline](group)
    want = c.gradient(forward_objective(c, c.reward, c.ref_logp, BETA / factor)) * factor
    assert small_policy.relative_error(got, want) < 1e-10


def test_gradient_of_the_objective_is_minus_beta_times_that_of_the_kl_to_the_optimum():
    for end in ENDS:
        c = case(end)
        target = targets.reverse_kl(c.ref_logp, c.reward, BETA)
        want = -BETA * c.gradient(lambda logp, target=target: kl.reverse(logp, target))
        assert small_policy.relative_error(c.gradient(reverse_objective(c, c.reward, c.ref_logp)), want) < 1e-12


def whole_set_anchor(c):
    good = c.reward >= THRESHOLD
    z = jnp.argmax(jnp.where(good, c.ref_logp, -jnp.inf))
    return {"anchor_reward": c.reward[z], "anchor_ref_logp": c.ref_logp[z]}


@pytest.mark.parametrize("baseline, group", [("none", 1), ("leave_one_out", 2)])
def test_sampled_mara_anchored_over_the_good_set_follows_equation_13(baseline, group):
    c = case(2)

    def loss(logp, mask, index):
        reward, ref_logp = augment.mara(
            c.reward[index][None],
            c.ref_logp[index][None],
            beta=BETA,
            threshold=THRESHOLD,
            **whole_set_anchor(c),
        )
        return objectives.reverse_kl(logp, mask, ref_logp, reward, beta=BETA, advantage=advantages.BY_NAME[baseline])[0]

    target = targets.mara(c.ref_logp, c.reward, BETA, THRESHOLD)
    want = -BETA * c.gradient(lambda logp: kl.reverse(logp, target))
    assert small_policy.relative_error(c.expected_gradient(loss, group), want) < 1e-10


@pytest.mark.parametrize("estimator", ["samples", "ratio"])
def test_sampled_forward_mara_follows_algorithm_2(estimator):
    c = case(2)
    settings = {"beta": BETA, "threshold": THRESHOLD, "direction": "forward", **whole_set_anchor(c)}
    reward, ref_hat = (x[0] for x in augment.mara(c.reward[None], c.ref_logp[None], **settings))
    assert float(jnp.sum(jnp.exp(ref_hat))) > 1.2  # unnormalised, or this tests nothing new
    if estimator == "samples":
        got = expected_forward_samples(c, "none", 1, reward, ref_hat)
    else:
        got = c.expected_gradient(
            lambda logp, mask, index: objectives.forward_kl_ratio(
                logp, mask, ref_hat[index][None], reward[index][None],
                beta=BETA, advantage=advantages.leave_one_out,
            )[0],
            2,
        )  # fmt: skip
    want = c.gradient(forward_objective(c, reward, ref_hat))
    assert small_policy.relative_error(got, want) < 1e-10
    # At Algorithm 2's own optimum the gradient of that objective in free logits vanishes.
    target = targets.mara(c.ref_logp, c.reward, BETA, THRESHOLD, "forward")
    free = jax.grad(lambda logits: forward_objective(c, reward, ref_hat)(jax.nn.log_softmax(logits)))(target)
    np.testing.assert_allclose(free, 0, atol=1e-12)


def test_sampled_mara_over_answers_follows_its_target():
    c = case(2)
    good = c.reward >= THRESHOLD
    member = good[:, None] & (c.answer[:, None] == jnp.arange(3))
    log_mass = jax.nn.logsumexp(jnp.where(member, (c.ref_logp + c.reward / BETA)[:, None], -jnp.inf), axis=0)

    def loss(logp, mask, index):
        reward, ref_logp = augment.mara_answers(
            c.reward[index][None], c.ref_logp[index][None], c.answer[index][None], log_mass[None],
            beta=BETA, threshold=THRESHOLD,
        )  # fmt: skip
        return objectives.reverse_kl(logp, mask, ref_logp, reward, beta=BETA, advantage=advantages.leave_one_out)[0]

    target = targets.mara_answers(c.ref_logp, c.reward, c.answer, BETA, THRESHOLD)
    want = -BETA * c.gradient(lambda logp: kl.reverse(logp, target))
    assert small_policy.relative_error(c.expected_gradient(loss, 2), want) < 1e-10


def test_masked_positions_may_hold_anything():
    c = case(2)
    index = jnp.array([0, 5, 14, 9])

    def loss(params, filling):
        logp = enumeration.token_logp(params, c.strings)[index][None]
        mask = jnp.asarray(c.strings.mask)[index][None]
        logp = jnp.where(mask > 0, logp, filling)
        return objectives.reverse_kl(
            logp, mask, c.ref_logp[index][None], c.reward[index][None], beta=BETA, advantage=advantages.mean
        )[0]

    clean, dirty = (jax.grad(loss)(jnp.asarray(c.params), filling) for filling in (0.0, jnp.nan))
    assert np.isfinite(clean).all() and np.any(clean != 0)
    np.testing.assert_array_equal(clean, dirty)


def test_metrics_by_hand():
    logp = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 1.0]]]))
    mask = jnp.array([[[1, 1], [1, 0]]])
    ref_logp = jnp.log(jnp.array([[0.125, 0.5]]))
    reward = jnp.array([[1.0, 3.0]])
    shared = {"beta": 0.5, "advantage": advantages.none}
    loss, metrics = objectives.reverse_kl(logp, mask, ref_logp, reward, **shared)
    # k1 = log 2 and -log 2; returns 1 - log(2)/2 and 3 + log(2)/2; both strings have probability 1/4.
    np.testing.assert_allclose(metrics["kl/k1"], 0, atol=1e-12)
    np.testing.assert_allclose(metrics["return/mean"], 2)
    np.testing.assert_allclose(loss, 2 * np.log(4))
    # Weights 1/2 and 2: effective samples 2.5^2 / 4.25.
    _, metrics = objectives.forward_kl_ratio(logp, mask, ref_logp, reward, **shared)
    np.testing.assert_allclose(metrics["weights/effective_samples"], 6.25 / 4.25)
    np.testing.assert_allclose(metrics["weights/largest_log"], np.log(2))
    loss, metrics = objectives.forward_kl_samples(logp, mask, reward, logp, mask, jnp.array([[1.0, 3.0]]), **shared)
    np.testing.assert_allclose(metrics["reference/nll"], 2 * np.log(4))
    np.testing.assert_allclose(metrics["weights/effective_samples"], 16 / 10)
    np.testing.assert_allclose(metrics["weights/largest_log"], np.log(3))
    np.testing.assert_allclose(loss, (2 + 0.5 * 2) * np.log(4))


def test_rewards_of_another_shape_are_refused():
    one = jnp.zeros((2, 3, 4))
    with pytest.raises(ValueError, match="shape"):
        objectives.reverse_kl(one, one + 1, jnp.zeros(3), jnp.zeros(3), beta=1.0, advantage=advantages.none)
