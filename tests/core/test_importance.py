"""Samples of an older policy: expected gradients by enumeration, and clipped and truncated weights by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_policy

from mara_jax.audit import enumeration, gradients, problems
from mara_jax.config import Algorithm
from mara_jax.core import advantages, importance, kl, method_rules, objectives
from mara_jax.core.scored import Numbers, Scored

pytestmark = pytest.mark.usefixtures("x64")

BETA, TAU = 0.3, 0.8
PROBLEM = problems.strings()
STRINGS, MASK = PROBLEM.strings, jnp.asarray(PROBLEM.strings.mask)
OLD = PROBLEM.params[0]
FAR = OLD + enumeration.random_logits(
    30, 0.7
)  # a policy whose strings are up to some ten times as likely as the older one's


def expected_gradient(loss, params, old_params=OLD, group=2):
    """Of minus the loss, over all groups drawn by the older policy; loss takes (logp, old logp, mask, indices)."""
    return -_program(loss, group)(jnp.asarray(params), jnp.asarray(old_params))


@functools.cache
def _program(loss, group):
    def gradient(params, old_params):
        old_nt = enumeration.token_logp(old_params, STRINGS)

        def of_group(logp, mask, index):
            return loss(logp, old_nt[index][None], mask, index)

        return small_policy.expected_gradient(of_group, params, STRINGS, group, drawn_by=old_params)

    return jax.jit(gradient)


@functools.cache
def objective_loss(algorithm, sampler=None):
    """The training objective's loss of a group, MARA's anchor over the whole set.

    sampler: seed of what a sampler's logits differ from OLD's by; groups are then drawn by it.
    """
    ref_nt = enumeration.token_logp(jnp.asarray(PROBLEM.ref_params), STRINGS)
    anchor = problems.anchors(PROBLEM, algorithm)
    mass = jnp.asarray(problems.log_mass(PROBLEM, algorithm))
    old_nt = enumeration.token_logp(jnp.asarray(OLD), STRINGS)

    def loss(logp, drawn_by, mask, index):
        row = [jnp.asarray(x)[index][None] for x in (PROBLEM.ref_logp, PROBLEM.reward, PROBLEM.answer)]
        old = {"old_logp": drawn_by} if sampler is None else {"old_logp": old_nt[index][None], "sampler_logp": drawn_by}
        scored = Scored(logp, mask, *row, mass, ref_nt[index][None], *anchor, **old)
        return method_rules.loss(algorithm, scored, None, Numbers(algorithm.beta, algorithm.threshold))[0]

    return loss


def exact_gradient(algorithm, params):
    """Of E[R] - beta KL under the policy as it is, rewards and reference augmented."""
    reward, ref_logp = problems.augmented(PROBLEM, algorithm)
    part = _exact()(jnp.asarray(params), jnp.asarray(reward), jnp.asarray(ref_logp))
    return part["reward"] - algorithm.beta * part[f"{algorithm.kl}_sequence"]


@functools.cache
def _exact():
    return jax.jit(functools.partial(gradients.exact_gradients, PROBLEM))


def case(**fields):
    return Algorithm(**{"method": "vanilla", "beta": BETA, "threshold": TAU, "importance": "sequence", **fields})


UNBIASED = [
    (case(baseline="none"), 1),
    (case(), 2),
    (case(method="mara", anchor="string", baseline="none"), 1),
    (case(method="mara", anchor="answer"), 2),
    (case(estimator="k2_in_loss"), 2),
    (case(kl="forward", estimator="ratio"), 2),
    pytest.param(case(kl="forward", estimator="k3_in_loss"), 2, marks=pytest.mark.slow),
    pytest.param(case(method="mara", anchor="string"), 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("algorithm", "group"), UNBIASED, ids=lambda x: str(x) if isinstance(x, int) else f"{x.method}-{x.estimator}"
)
def test_whole_string_ratios_have_the_present_objectives_gradient(algorithm, group):
    """However far the policy has moved: here a string's ratio reaches from under .2 to over 4."""
    ratio = np.exp(
        enumeration.string_logp(jnp.asarray(FAR), STRINGS) - enumeration.string_logp(jnp.asarray(OLD), STRINGS)
    )
    assert ratio.min() < 0.2 and ratio.max() > 4
    got = expected_gradient(objective_loss(algorithm), FAR, group=group)
    assert small_policy.relative_error(got, exact_gradient(algorithm, FAR)) < 1e-9


@pytest.mark.slow
def test_the_group_mean_shrinks_a_stale_gradient_as_it_does_a_fresh_one():
    algorithm = case(baseline="mean")
    got = expected_gradient(objective_loss(algorithm), FAR)
    assert small_policy.relative_error(got, exact_gradient(algorithm, FAR) / 2) < 1e-9


def test_strings_of_the_reference_need_no_ratio():
    """The reward's part is weighted, the likelihood's is not: one string of the reference a group."""
    ref_n = jnp.asarray(PROBLEM.ref_logp)
    reward = jnp.asarray(PROBLEM.reward)

    old_nt = enumeration.token_logp(OLD, STRINGS)

    def loss(logp_nt, index):
        logp, old, mask = (x[index][None] for x in (logp_nt, old_nt, MASK))
        off_policy = importance.OffPolicy(importance.log_ratio(logp, old, mask, "sequence"), jnp.ones((1, 1, 1)))

        def one(ref_index):
            return objectives.forward_kl_samples(
                logp, mask, reward[index][None], logp_nt[ref_index][None, None], MASK[ref_index][None, None],
                jnp.ones((1, 1)), beta=BETA, advantage=advantages.leave_one_out, off_policy=off_policy,
            )[0]  # fmt: skip

        return jnp.sum(jnp.exp(ref_n) * jax.vmap(one)(jnp.arange(len(ref_n))))

    groups = enumeration.groups(len(ref_n), 2)
    got = -jax.jit(lambda params: enumeration.expected_gradient(loss, params, STRINGS, groups, OLD))(FAR)
    assert small_policy.relative_error(got, exact_gradient(case(kl="forward"), FAR)) < 1e-9


# What each mistake optimises instead; the error is that of the gradient at FAR.
def old_k1(logp, old, mask, index):
    """The penalty of the policy that drew the strings, as it was when they were drawn."""
    ratio = jnp.exp(jnp.sum((logp - old) * mask, -1))
    k1 = jnp.sum(old * mask, -1) - jnp.asarray(PROBLEM.ref_logp)[index][None]
    advantage = advantages.leave_one_out(jnp.asarray(PROBLEM.reward)[index][None] - BETA * k1)
    return -jnp.mean(advantage * ratio)


def weights_inside_the_baseline(logp, old, mask, index):
    live = jnp.sum(logp * mask, -1)
    frozen = jax.lax.stop_gradient(live)
    k1 = frozen - jnp.asarray(PROBLEM.ref_logp)[index][None]
    signal = jnp.exp(frozen - jnp.sum(old * mask, -1)) * (jnp.asarray(PROBLEM.reward)[index][None] - BETA * k1)
    return -jnp.mean(advantages.leave_one_out(signal) * live)


def no_ratio(logp, old, mask, index):
    return objective_loss(case(importance="none"))(logp, logp, mask, index)


@pytest.mark.parametrize("bug", [old_k1, weights_inside_the_baseline, no_ratio], ids=lambda f: f.__name__)
def test_mistakes_are_seen_where_the_policy_has_moved_and_only_there(bug):
    exact = exact_gradient(case(), FAR)
    assert small_policy.relative_error(expected_gradient(bug, FAR), exact) > 0.05
    assert small_policy.relative_error(expected_gradient(bug, OLD), exact_gradient(case(), OLD)) < 1e-9


def test_the_samplers_k1_pushes_away_from_the_sampler():
    """E[R] - beta KL(pi || ref) + beta KL(pi || pi_old): within a rollout nothing holds the policy."""

    def value(params):
        logp = enumeration.string_logp(params, STRINGS)
        old = enumeration.string_logp(jnp.asarray(OLD), STRINGS)
        kept = kl.reverse(logp, jnp.asarray(PROBLEM.ref_logp)) - kl.reverse(logp, old)
        return jnp.sum(jnp.exp(logp) * PROBLEM.reward) - BETA * kept

    want = jax.jit(jax.grad(value))(jnp.asarray(FAR))
    assert small_policy.relative_error(expected_gradient(old_k1, FAR), want) < 1e-9


FORMS = [
    case(importance="sequence", clip=0.2),
    case(importance="length_normalised", clip=0.1),
    case(importance="token", clip=0.2),
    pytest.param(case(importance="token"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("algorithm", FORMS, ids=lambda a: f"{a.importance}-{a.clip}")
def test_surrogates_are_exact_at_the_sampler_biased_away_from_it_and_rest_at_the_optimum(algorithm):
    """At the optimum every string has one signal, k1 being the present policy's: no weights can tell them apart."""
    loss = objective_loss(algorithm)
    assert small_policy.relative_error(expected_gradient(loss, OLD), exact_gradient(algorithm, OLD)) < 1e-9
    assert small_policy.relative_error(expected_gradient(loss, FAR), exact_gradient(algorithm, FAR)) > 0.05
    best = optimum()
    assert np.abs(exact_gradient(algorithm, best)).max() < 1e-9
    assert np.abs(expected_gradient(loss, best)).max() < 1e-9
    # With the sampler's k1 the optimum is left again.
    assert np.abs(expected_gradient(old_k1, best)).max() > 1e-3


@functools.cache
def optimum():
    """Logits of the policy that draws each string with probability ref exp(R / beta), normalised."""
    log_weight = np.asarray(PROBLEM.ref_logp) + PROBLEM.reward / BETA
    logits = np.zeros((enumeration.CONTEXTS, enumeration.VOCAB))
    reached = np.full(logits.shape, -np.inf)
    for row, tokens, mask in zip(STRINGS.context, STRINGS.tokens, STRINGS.mask, strict=True):
        for n in np.flatnonzero(mask):
            same = ((STRINGS.tokens == tokens) | (np.arange(enumeration.LENGTH) > n)).all(-1) & (STRINGS.mask[:, n] > 0)
            reached[row[n], tokens[n]] = np.logaddexp.reduce(log_weight[same])
    return np.where(np.isfinite(reached), reached, logits)


def moved(logp, old):
    return jnp.asarray(logp)[None], jnp.asarray(old)[None], jnp.array([[[1, 1], [1, 0]]])


# Two strings, of two tokens and of one (its masked token must not count): ratios 2 and .9 of tokens, and .5.
LOGP = np.log([[0.4, 0.45], [0.1, 0.7]])
OLD_LOGP = np.log([[0.2, 0.5], [0.2, 0.1]])


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ("none", [[1], [1]]),
        ("sequence", [[1.8], [0.5]]),
        ("length_normalised", [[np.sqrt(1.8)], [0.5]]),
        ("token", [[2, 0.9], [0.5, 1]]),
    ],
)
def test_ratios_by_hand(form, want):
    got = jnp.exp(importance.log_ratio(*moved(LOGP, OLD_LOGP), form))
    np.testing.assert_allclose(got, np.array(want)[None], rtol=1e-12)


# advantage, clip -> d(-loss)/d(logp) of the counted tokens, times the two strings of the mean.
BY_HAND = [
    ("sequence", 0.0, [3, -2], [[5.4, 5.4], [-1.0, 0]]),
    ("sequence", 0.2, [3, -2], [[0, 0], [0, 0]]),  # both have left the range where they are pushed
    ("sequence", 0.2, [-3, 2], [[-5.4, -5.4], [1.0, 0]]),  # both are being pushed back: not clipped
    ("length_normalised", 0.5, [3, -2], [[3 * np.sqrt(1.8)] * 2, [-1.0, 0]]),
    ("token", 0.2, [3, -2], [[0, 2.7], [0, 0]]),
    ("token", 0.2, [-3, 2], [[-6, -2.7], [1.0, 0]]),
]


@pytest.mark.parametrize(("form", "clip", "advantage", "want"), BY_HAND)
def test_clipped_gradients_by_hand(form, clip, advantage, want):
    logp, old, mask = moved(LOGP, OLD_LOGP)

    def earned(logp):
        off_policy = importance.OffPolicy(importance.log_ratio(logp, old, mask, form), jnp.ones((1, 1, 1)), clip)
        ref = objectives.sequence_logp(logp, mask)  # no penalty: the signal is the reward
        return -2 * objectives.reverse_kl(
            logp, mask, jax.lax.stop_gradient(ref), jnp.asarray([advantage], float),
            beta=1.0, advantage=advantages.none, off_policy=off_policy,
        )[0]  # fmt: skip

    np.testing.assert_allclose(jax.jit(jax.grad(earned))(logp)[0], want, atol=1e-12)


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_clipped_gradients_are_those_of_the_published_minimum(form):
    """min(r A, clip(r) A), differentiated by itself, with k1 of the present policy in A."""
    logp, old, mask = moved(LOGP, OLD_LOGP)
    reward, ref = jnp.array([[1.0, 0.2]]), jnp.array([[-1.5, -2.0]])

    def ours(logp):
        off_policy = importance.OffPolicy(importance.log_ratio(logp, old, mask, form), jnp.ones((1, 1, 1)), 0.2)
        return objectives.reverse_kl(
            logp, mask, ref, reward, beta=BETA, advantage=advantages.leave_one_out, off_policy=off_policy
        )[0]

    def published(logp):
        signal = jax.lax.stop_gradient(reward - BETA * (jnp.sum(logp * mask, -1) - ref))
        advantage = advantages.leave_one_out(signal)[..., None]
        change = (logp - old) * mask
        ratio = jnp.exp(jnp.sum(change, -1, keepdims=True) if form == "sequence" else change)
        least = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        return -jnp.mean(jnp.sum(least * (mask if form == "token" else 1.0), -1))

    np.testing.assert_allclose(jax.jit(jax.grad(ours))(logp), jax.jit(jax.grad(published))(logp), atol=1e-12)


def test_truncated_weights_by_hand():
    """Trainer over sampler: 1.8 and .5 of strings, 2, .9 and .5 of tokens; the cap is 1.5."""
    logp, sampler, mask = moved(LOGP, OLD_LOGP)
    for level, want in (("sequence", [[1.5], [0.5]]), ("token", [[1.5, 0.9], [0.5, 1]])):
        got = importance.truncated(importance.log_ratio(logp, sampler, mask, level), 1.5)
        np.testing.assert_allclose(got, np.array(want)[None], rtol=1e-12)
    same = importance.truncated(importance.log_ratio(logp, logp, mask, "token"), 1.5)
    assert (np.asarray(same) == 1).all()
    scored = Scored(
        logp, mask, jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), jnp.zeros((1, 2), int), jnp.zeros((1, 1)),
        sampler_logp=sampler,
    )  # fmt: skip
    algorithm = case(importance="none", truncate=1.5, truncate_level="token", baseline="none")
    of = jax.grad(
        lambda x: method_rules.loss(algorithm, scored._replace(logp=x), None, Numbers(0.0, TAU)), has_aux=True
    )
    grads, metrics = jax.jit(of)(logp)
    # Reward 1 and 0, no penalty: -1/2 of the first string's weights.
    np.testing.assert_allclose(grads[0], [[-0.75, -0.45], [0, 0]], rtol=1e-12)
    assert float(metrics["sampler_weight/mean"]) == pytest.approx((1.5 + 0.9 + 0.5) / 3)
    assert float(metrics["sampler_weight/max"]) == pytest.approx(1.5)
    assert float(metrics["sampler_weight/truncated_fraction"]) == pytest.approx(1 / 3)
    assert float(metrics["sampler_weight/effective_samples"]) == pytest.approx(2.3**2 / (1.8**2 + 0.5**2))
    assert "ratio/mean" not in metrics


def test_a_sampler_that_differs_is_corrected_exactly_under_a_cap_never_reached():
    """Drawn by the sampler, weighted trainer over sampler, then policy over trainer: the present gradient."""
    sampler = OLD + enumeration.random_logits(40, 0.2)

    def error(cap, params):
        algorithm = case(truncate=cap)

        got = expected_gradient(objective_loss(algorithm, 40), params, sampler)
        return small_policy.relative_error(got, exact_gradient(algorithm, params))

    assert error(100.0, FAR) < 1e-9
    assert 1e-3 < error(1.2, OLD) < 0.5


def test_metrics_of_ratios_by_hand():
    logp, old, mask = moved(LOGP, OLD_LOGP)
    scored = Scored(
        logp, mask, jnp.sum(logp * mask, -1), jnp.array([[3.0, -2.0]]), jnp.zeros((1, 2), int), jnp.zeros((1, 1)),
        old_logp=old,
    )  # fmt: skip
    known = {
        "sequence": ((1.8 + 0.5) / 2, 1.8, 1.0),
        "token": ((2 + 0.9 + 0.5) / 3, 2.0, 2 / 3),
        "length_normalised": ((np.sqrt(1.8) + 0.5) / 2, np.sqrt(1.8), 1.0),
    }
    for form, (mean, largest, clipped) in known.items():
        algorithm = case(importance=form, clip=0.2, baseline="none")
        of = jax.jit(functools.partial(method_rules.loss, algorithm, reference=None, numbers=Numbers(BETA, TAU)))
        _, metrics = of(scored)
        assert float(metrics["ratio/mean"]) == pytest.approx(mean)
        assert float(metrics["ratio/max"]) == pytest.approx(largest)
        assert float(metrics["ratio/effective_samples"]) == pytest.approx(2.3**2 / (1.8**2 + 0.5**2))
        assert float(metrics["objective/clipped_fraction"]) == pytest.approx(clipped)


@pytest.mark.parametrize("form", ["none", "sequence", "length_normalised", "token"])
def test_without_a_distance_every_weight_is_one(form):
    logp, _, mask = moved(LOGP, OLD_LOGP)
    same = importance.log_ratio(logp, logp, mask, form)
    off_policy = importance.OffPolicy(same, importance.truncated(same, 1.0), 0.1)
    assert (np.asarray(importance.coefficient(off_policy, jnp.array([[1.0, -1.0]]))) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sequence", "length_normalised", "token"])
def test_ratio_one_is_todays_gradient_bit_for_bit(form):
    rng = np.random.default_rng(5)
    logp = jnp.asarray(np.log(rng.uniform(0.1, 1, size=(3, 4, 5))), jnp.float32)
    mask = jnp.asarray(rng.integers(1, 6, size=(3, 4, 1)) > np.arange(5), jnp.int32)
    reward, ref = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    scored = Scored(logp, mask, ref, reward, jnp.zeros((3, 4), int), jnp.zeros((3, 1)))

    def gradient(algorithm, old):
        def loss(logp):
            return method_rules.loss(algorithm, scored._replace(logp=logp, old_logp=old), None, Numbers(0.1, 0.5))[0]

        return jax.grad(loss)(logp)  # not compiled as a whole, where constants may be multiplied in another order

    today = gradient(case(importance="none"), None)
    for old in (None, logp):
        np.testing.assert_array_equal(gradient(case(importance=form, clip=0.2), old), today)


def test_a_kl_in_the_loss_takes_whole_unclipped_ratios_only():
    logp, old, mask = moved(LOGP, OLD_LOGP)
    row = jnp.zeros((1, 2))
    scored = Scored(logp, mask, row, row, row, jnp.zeros((1, 1)), old_logp=old)
    for fields in ({"importance": "token"}, {"clip": 0.2}):
        with pytest.raises(ValueError, match=r"algorithm.importance=sequence with algorithm.clip=0"):
            method_rules.loss(case(estimator="k2_in_loss", **fields), scored, None, Numbers(BETA, TAU))
