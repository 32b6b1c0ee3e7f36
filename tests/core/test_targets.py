"""Optima against brute force in float64, the paper's numbers, and each objective's own gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from mara_jax.core import kl, targets
from mara_jax.policies import categorical
from mara_jax.toy import problems

BETAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
TAU = 0.5


def random_problems(count=60, outcomes=12, seed=0):
    """Random references, some peaked, a quarter of the outcomes without mass, rewards with ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, outcomes)) * rng.choice([0.5, 3.0, 20.0], size=(count, 1))
    logits[rng.uniform(size=logits.shape) < 0.25] = -np.inf
    logits[:, :2] = np.where(np.isfinite(logits[:, :2]), logits[:, :2], 0.0)
    ref_logp = logits - special.logsumexp(logits, axis=-1, keepdims=True)
    reward = np.round(rng.uniform(size=logits.shape), 1)
    close = rng.uniform(size=logits.shape) < 0.3  # differences small enough to matter at the smallest beta
    reward = np.where(close, 1 - rng.uniform(size=logits.shape) * 1e-3, reward)
    reward[::5, :2] = 1.0  # tied best rewards
    answer = rng.integers(-1, 3, size=logits.shape)
    # Values that float32 holds exactly: both precisions see the same numbers.
    return ref_logp.astype(np.float32), reward.astype(np.float32), answer


def brute_reverse(log_ref, reward, beta):
    score = log_ref + (reward - reward[log_ref > -np.inf].max()) / beta
    return np.exp(score - special.logsumexp(score))


def brute_forward(log_ref, reward, beta):
    """Solve Eq. 6 with scipy for the logarithm of Lambda - Rmax."""
    on = log_ref > -np.inf
    gap = reward[on].max() - reward[on]
    weight = np.log(beta) + log_ref[on]

    def f(u):
        return special.logsumexp(weight - np.logaddexp(u, np.log(np.maximum(gap, 1e-300))))

    excess = reward.max() - reward[on].max()
    p = np.zeros_like(log_ref)
    if excess > 0 and f(np.log(excess)) < 0:
        p[on] = np.exp(weight) / (excess + gap)
        takers = ~on & (reward == reward.max())
        p[takers] = (1 - p.sum()) / takers.sum()
        return p
    root = optimize.brentq(f, weight[gap == 0].max() - 1, special.logsumexp(weight) + 1, xtol=1e-14)
    p[on] = np.exp(weight - np.logaddexp(root, np.log(np.maximum(gap, 1e-300))))
    return p


def brute_mara(log_ref, reward, beta, direction):
    good = reward >= TAU
    if np.any(good & (log_ref > -np.inf)):
        z = np.argmax(np.where(good, log_ref, -np.inf))
        log_ref, reward = np.where(good, log_ref[z], log_ref), np.where(good, reward[z], reward)
    return (brute_reverse if direction == "reverse" else brute_forward)(log_ref, reward, beta)


def brute_answers(log_ref, reward, answer, beta, direction):
    good = (reward >= TAU) & (answer >= 0) & (log_ref > -np.inf)
    if not good.any():
        return (brute_reverse if direction == "reverse" else brute_forward)(log_ref, reward, beta)
    weight = log_ref + reward / beta if direction == "reverse" else log_ref
    mass = {a: special.logsumexp(weight[good & (answer == a)]) for a in set(answer[good])}
    z = max(mass, key=lambda a: mass[a])
    bonus = np.array([mass[z] - mass[a] if g else 0.0 for a, g in zip(answer, good, strict=True)])
    if direction == "reverse":
        return brute_reverse(log_ref, reward + beta * bonus, beta)
    likeliest = np.argmax(np.where(good & (answer == z), log_ref, -np.inf))
    return brute_forward(log_ref + bonus, np.where(good, reward[likeliest], reward), beta)


KINDS = {
    "reverse": (lambda r, w, a, b: targets.reverse_kl(r, w, b), lambda r, w, a, b: brute_reverse(r, w, b)),
    "forward": (lambda r, w, a, b: targets.forward_kl(r, w, b), lambda r, w, a, b: brute_forward(r, w, b)),
} | {
    f"{kind}-{direction}": pair
    for direction in ("reverse", "forward")
    for kind, pair in {
        "mara": (
            lambda r, w, a, b, d=direction: targets.mara(r, w, b, TAU, d),
            lambda r, w, a, b, d=direction: brute_mara(r, w, b, d),
        ),
        "answers": (
            lambda r, w, a, b, d=direction: targets.mara_answers(r, w, a, b, TAU, d),
            lambda r, w, a, b, d=direction: brute_answers(r, w, a, b, d),
        ),
    }.items()
}


@functools.cache
def computed(kind, dtype):
    """Probabilities [beta, problem, outcome], under jit and two vmaps."""
    ref_logp, reward, answer = random_problems()
    of = jax.vmap(jax.vmap(KINDS[kind][0], (0, 0, 0, None)), (None, None, None, 0))
    with jax.enable_x64(dtype == "float64"):
        logp = jax.jit(of)(ref_logp.astype(dtype), reward.astype(dtype), answer, np.array(BETAS, dtype))
        assert logp.dtype == dtype
        return np.exp(np.asarray(logp, np.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_against_brute_force(kind):
    ref_logp, reward, answer = random_problems()
    for b, beta in enumerate(BETAS):
        for i in range(len(reward)):
            want = KINDS[kind][1](ref_logp[i].astype(float), reward[i].astype(float), answer[i], beta)
            got = computed(kind, "float64")[b, i]
            # Where R / beta is 1e4, brute force itself keeps only 1e-12 of it.
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-10, err_msg=f"problem {i}, beta {beta}")
            np.testing.assert_allclose(got.sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_within_total_variation_1e_5_of_float64(kind):
    distance = np.abs(computed(kind, "float32") - computed(kind, "float64")).sum(-1) / 2
    assert distance.max() < 1e-5


def test_the_problems_hold_the_hard_cases():
    ref_logp, reward, _ = random_problems()
    off = ~np.isfinite(ref_logp)
    best_off = (np.where(off, reward, -1).max(-1) > np.where(off, -1, reward).max(-1)).sum()
    within = np.where(off, -1, reward)
    ties = ((within == within.max(-1, keepdims=True)).sum(-1) > 1).sum()
    spilt = computed("forward", "float64")[1][off].max()
    assert best_off > 5 and ties > 5 and spilt > 0.5


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_objective_is_stationary_at_its_optimum(x64, direction):
    rng = np.random.default_rng(5)
    for beta in (0.02, 0.3, 2.0):
        ref_logp = special.log_softmax(rng.normal(size=9)) + (0.7 if direction == "forward" else 0.0)
        reward = rng.uniform(size=9)
        optimum = (targets.reverse_kl if direction == "reverse" else targets.forward_kl)(ref_logp, reward, beta)
        gradient = categorical.exact_gradient(optimum, ref_logp, reward, beta, direction)
        np.testing.assert_allclose(gradient, 0, atol=1e-13)
        nearby = special.log_softmax(optimum + 0.3 * rng.normal(size=(50, 9)), axis=-1)
        divergence = kl.reverse if direction == "reverse" else kl.forward
        value = [np.exp(logp) @ reward - beta * divergence(logp, ref_logp) for logp in (nearby, optimum)]
        assert np.all(value[0] < value[1])


@pytest.mark.parametrize(
    "kind", ["reverse", "forward", "mara-reverse", "mara-forward", "answers-reverse", "answers-forward"]
)
def test_derivatives_by_finite_differences(x64, kind):
    rng = np.random.default_rng(11)
    ref_logp = special.log_softmax(np.append(rng.normal(size=5), -np.inf))
    reward = np.array([0.1, 0.9, 0.9, 0.6, 0.3, 0.2])
    answer, beta = np.array([0, 0, 1, 1, 2, 0]), 0.2
    direction, weight = rng.normal(size=(2, 6))
    direction[2] = direction[1]  # tied best rewards move together, or the best one would change between the sides

    def along(step):
        moved = reward + step * direction, beta * jnp.exp(step)
        return jnp.sum(weight * jnp.exp(KINDS[kind][0](ref_logp + step * weight, moved[0], answer, moved[1])))

    along = jax.jit(along)
    derivative = jax.grad(along)(0.0)
    numeric = (along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(derivative, numeric, rtol=1e-6)


def test_all_rewards_equal_and_one_outcome(x64):
    ref_logp = np.log([0.5, 0.3, 0.2])
    for kind in ("reverse", "forward"):
        np.testing.assert_allclose(np.exp(KINDS[kind][0](ref_logp, np.ones(3), None, 1e-4)), [0.5, 0.3, 0.2])
        np.testing.assert_allclose(KINDS[kind][0](np.zeros(1), np.ones(1), None, 0.1), 0, atol=1e-12)


def test_figure_2(x64):
    p = problems.figure2()
    np.testing.assert_allclose(p.ref_logp[[0, 99]], [-4.0514, -5.9514], atol=5e-5)
    reverse = {
        1: (0.0291, 0.0056), 0.25: (0.0766, 0.0311), 0.15: (0.0951, 0.0752), 0.132: (0.0942, 0.0935),
        0.10: (0.0808, 0.1468), 0.05: (0.0149, 0.3303), 0.01: (0, 0.7362),
    }  # fmt: skip
    forward = {1: (0.0320, 0.0088), 0.5: (0.0337, 0.1525), 0.1: (0.0070, 0.8171), 0.01: (0.0007, 0.9816)}
    for optimum, peaks in ((targets.reverse_kl, reverse), (targets.forward_kl, forward)):
        for beta, want in peaks.items():
            g = np.exp(optimum(p.ref_logp, p.reward, beta))
            np.testing.assert_allclose((g[:50].max(), g[50:].max()), want, atol=5.1e-5)
    # Lambda, read off an outcome of reward almost 0: Lambda = R + beta ref / G.
    for beta, want in ((1, 1.2938), (0.5, 1.00772), (0.01, 0.99921)):
        g = np.exp(targets.forward_kl(p.ref_logp, p.reward, beta))
        np.testing.assert_allclose(p.reward[99] + beta * np.exp(p.ref_logp[99]) / g[99], want, atol=6e-5)


def test_flips_of_figure_2(x64):
    p = problems.figure2()
    tie = targets.tie_beta(p.ref_logp[0], 0.75, p.ref_logp[99], 1.0)
    np.testing.assert_allclose(tie, 0.25 / 1.9)
    np.testing.assert_allclose(targets.log_ratio(p.ref_logp[0], 0.75, p.ref_logp[99], 1.0, tie), 0, atol=1e-12)

    def left_leads(beta):
        g = np.exp(targets.forward_kl(p.ref_logp, p.reward, beta))
        return g[:50].max() > g[50:].max()

    assert left_leads(0.68) and not left_leads(0.62)


def test_log_ratio_is_that_of_the_optimum(x64):
    ref_logp, reward = special.log_softmax([0.3, -1.0, 2.0]), np.array([0.2, 0.9, 0.1])
    g = targets.reverse_kl(ref_logp, reward, 0.07)
    np.testing.assert_allclose(
        targets.log_ratio(ref_logp[0], reward[0], ref_logp[1], reward[1], 0.07), g[0] - g[1], rtol=1e-12
    )


def test_figures_3_and_5_and_the_iclr_examples(x64):
    np.testing.assert_allclose(np.exp(targets.log_ratio(0.0, 0.1, 0.0, 0.0, 1e-3)), 2.69e43, rtol=2e-3)
    p = problems.figure5()
    for beta in (1.0, 0.1, 0.01):
        g = np.exp(targets.reverse_kl(p.ref_logp, p.reward, beta))
        np.testing.assert_allclose(g[20] / g[79], 6.686, rtol=1e-4)
    third = np.log(np.ones(3) / 3)
    np.testing.assert_allclose(
        np.exp(targets.reverse_kl(third, np.array([0, 0.9, 1]), 0.5)), [0.069, 0.419, 0.512], atol=6e-4
    )
    np.testing.assert_allclose(np.exp(targets.reverse_kl(third, np.array([0, 0.9, 1]), 1e-3)), [0, 0, 1], atol=1e-12)
    g = np.exp(targets.reverse_kl(np.log([0.68, 0.30, 0.02]), np.array([0.0, 1.0, 1.0]), 1e-2))
    np.testing.assert_allclose(g, [0, 0.9375, 0.0625], atol=1e-12)


def test_figure_6(x64):
    p = problems.figure6()
    good = p.reward == 1
    g = np.exp(targets.reverse_kl(p.ref_logp, p.reward, 0.01))
    np.testing.assert_allclose(g[[0, 50]], [0.0616, 0.00385], rtol=1e-3)
    for direction, beta, want in (
        ("reverse", 0.01, 0.0200), ("reverse", 1.0, 0.01939),
        ("forward", 0.01, 0.01996), ("forward", 1.0, 0.01884),
    ):  # fmt: skip
        g = np.exp(targets.mara(p.ref_logp, p.reward, beta, p.threshold, direction))
        np.testing.assert_allclose(g[good], want, rtol=6e-4)
        assert np.ptp(g[good]) < 1e-15
    np.testing.assert_allclose(g[25], 0.0043, atol=5e-5)
    # Algorithm 2's reference sums to 2.647 there, and its root is 2.589.
    ref_hat = np.where(good, np.exp(p.ref_logp[0]), np.exp(p.ref_logp))
    np.testing.assert_allclose(ref_hat.sum(), 2.647, atol=5e-4)
    np.testing.assert_allclose(ref_hat[0] / g[0], 2.589, atol=5e-4)


def test_algorithm_1s_reward_is_not_flat_under_forward_kl(x64):
    """Why forward KL has a form of its own: the best share goes to the good outcome least likely before."""
    ref_logp, reward = np.log([0.6, 0.3, 0.05, 0.04, 0.01]), np.array([1.0, 1, 1, 0, 0])
    wrong = np.exp(targets.forward_kl(ref_logp, np.where(reward > 0, 1 + 0.1 * (ref_logp[0] - ref_logp), 0), 0.1))
    right = np.exp(targets.mara(ref_logp, reward, 0.1, 0.8, "forward"))
    assert wrong[2] > 0.5 and np.ptp(right[:3]) < 1e-15


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_mara_over_answers_on_60_outcomes(x64, direction):
    rng = np.random.default_rng(8)
    answer = rng.choice(3, size=60, p=[0.3, 0.3, 0.4])
    reward = (rng.uniform(size=60) < 0.7).astype(float)
    ref_logp = special.log_softmax(rng.normal(size=60) - 2.0 * (answer == 2))
    good = reward == 1
    for beta in (0.01, 0.1, 0.3, 1.0):
        g = np.exp(targets.mara_answers(ref_logp, reward, answer, beta, 0.8, direction))
        mass = np.array([g[good & (answer == a)].sum() for a in range(3)])
        np.testing.assert_allclose(mass, mass[0], rtol=1e-10)
        if beta == 0.01:
            np.testing.assert_allclose(mass, 1 / 3, atol=1e-3 if direction == "reverse" else 2e-2)
        for a in range(3):
            members = good & (answer == a)
            inside = np.exp(ref_logp[members]) / np.exp(ref_logp[members]).sum()
            np.testing.assert_allclose(g[members] / mass[a], inside, rtol=1e-10)
        strings = np.exp(targets.mara(ref_logp, reward, beta, 0.8, direction))
        counts = [strings[good & (answer == a)].sum() / strings[good].sum() for a in range(3)]
        np.testing.assert_allclose(counts, [(good & (answer == a)).sum() / good.sum() for a in range(3)])


def test_both_anchors_coincide_where_each_class_has_one_string(x64):
    ref_logp, reward = np.log([0.6, 0.3, 0.05, 0.04, 0.01]), np.array([1.0, 1, 1, 0, 0])
    for direction in ("reverse", "forward"):
        one = targets.mara(ref_logp, reward, 0.1, 0.8, direction)
        np.testing.assert_allclose(targets.mara_answers(ref_logp, reward, np.arange(5), 0.1, 0.8, direction), one)


def test_nothing_good_leaves_the_plain_optimum(x64):
    ref_logp, reward = np.log([0.6, 0.4, 0.0 + 1e-300]), np.array([0.1, 0.2, 0.3])
    with np.errstate(divide="ignore"):
        unreachable = np.log([0.6, 0.4, 0.0]), np.array([0.1, 0.2, 0.9])
    answer = np.array([0, 1, 1])
    for direction, plain in (("reverse", targets.reverse_kl), ("forward", targets.forward_kl)):
        for r, w in ((ref_logp, reward), unreachable):
            for got in (
                targets.mara(r, w, 0.1, 0.5, direction),
                targets.mara_answers(r, w, answer, 0.1, 0.5, direction),
            ):
                np.testing.assert_array_equal(got, plain(r, w, 0.1))
        # Good, but no answer: not augmented either.
        np.testing.assert_array_equal(
            targets.mara_answers(ref_logp, reward, np.full(3, -1), 0.1, 0.15, direction),
            plain(ref_logp, reward, 0.1),
        )


def test_good_outcomes_outside_the_reference_count_with_the_anchor(x64):
    with np.errstate(divide="ignore"):
        ref_logp = np.log([0.5, 0.5, 0.0])
    reward = np.array([0.0, 1.0, 1.0])
    e = np.exp(1 / 0.5)  # Eq. 13 by hand: weights .5, .5 e^2, .5 e^2
    np.testing.assert_allclose(np.exp(targets.mara(ref_logp, reward, 0.5, 0.8)), np.array([1, e, e]) / (1 + 2 * e))


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="sideways"):
        targets.mara(np.zeros(2), np.zeros(2), 0.1, 0.5, "sideways")  # type: ignore[arg-type]
