"""Optima from completions of other policies: exact where the samples are an enumeration, else nearer as draws grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.core import augment, forecast, reweighted, targets

# Six completions: rewards, answers, the reference, and two policies of which the second has moved far from it.
REWARD = np.array([1.0, 1.0, 0.9, 0.5, 0.0, 0.0])
ANSWER = np.array([0, 0, 1, 1, -1, -1])
REF = np.array([0.30, 0.10, 0.05, 0.15, 0.25, 0.15])
POLICIES = np.array([[0.3, 0.1, 0.1, 0.1, 0.2, 0.2], [0.6, 0.2, 0.05, 0.05, 0.05, 0.05]])
DRAWS = 20  # of each policy, which then draws every completion exactly as often as it should
METHODS = ("vanilla", "answers", "strings")
BETA, THRESHOLD = 0.4, 0.8


def stored(policies: np.ndarray, chosen: list[np.ndarray]) -> reweighted.Weighted:
    """What a run stores of the completions that these policies drew."""
    index = np.concatenate(chosen)
    logp = np.concatenate([np.log(policy[drawn]) for policy, drawn in zip(policies, chosen, strict=True)])
    ref_logp = np.log(REF[index])
    return reweighted.Weighted(REWARD[index], ANSWER[index], ref_logp, reweighted.log_weights(logp, ref_logp))


def enumerated() -> reweighted.Weighted:
    counts = np.rint(POLICIES * DRAWS).astype(int)
    return stored(POLICIES, [np.repeat(np.arange(6), count) for count in counts])


def drawn(count: int, seed: int) -> reweighted.Weighted:
    rng = np.random.default_rng(seed)
    return stored(POLICIES, [rng.choice(6, count, p=policy / policy.sum()) for policy in POLICIES])


def exact(method: str, direction, beta: float = BETA, threshold: float = THRESHOLD) -> np.ndarray:
    """[6] The optimum over the completions themselves."""
    ref_logp = jnp.log(REF)
    if method == "vanilla":
        optimum = targets.reverse_kl if direction == "reverse" else targets.forward_kl
        return np.exp(np.asarray(optimum(ref_logp, jnp.asarray(REWARD), beta), np.float64))
    if method == "strings":
        return np.exp(np.asarray(targets.mara(ref_logp, REWARD, beta, threshold, direction), np.float64))
    return np.exp(np.asarray(targets.mara_answers(ref_logp, REWARD, ANSWER, beta, threshold, direction), np.float64))


def masses(p: np.ndarray) -> np.ndarray:
    return np.array([p[a == ANSWER].sum() for a in (0, 1, -1)])


def objective(method: str, direction="reverse", beta: float = BETA, threshold: float = THRESHOLD):
    return forecast.Objective(method, direction, beta, threshold)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("beta", "threshold"), [(0.4, 0.8), (0.1, 0.8), (2.0, 0.95), (0.4, 0.3)])
def test_an_enumeration_gives_the_exact_optimum(method, direction, beta, threshold):
    """Both policies draw each completion as often as they should, so that weighted sums are sums over the reference."""
    got = reweighted.optimum(objective(method, direction, beta, threshold), enumerated(), 2)
    p = exact(method, direction, beta, threshold)
    assert np.allclose(got.mass[0], masses(p), atol=2e-6)
    assert got.reward[0] == pytest.approx(p @ REWARD, abs=2e-6)
    assert got.good[0] == pytest.approx(p[threshold <= REWARD].sum(), abs=2e-6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("method", METHODS)
def test_more_draws_come_nearer_to_the_optimum(method, direction):
    """Errors fall as 1 / sqrt(draws): from 100 draws of each policy to 20,000 by 14, here at least by 6."""
    p = exact(method, direction)

    def error(count: int) -> float:
        got = [reweighted.optimum(objective(method, direction), drawn(count, seed), 2) for seed in range(8)]
        return float(np.sqrt(np.mean([(one.mass[0] - masses(p)) ** 2 for one in got])))

    few, many = error(100), error(20_000)
    assert many < 1e-2 and many < few / 6


@pytest.mark.parametrize("method", ["vanilla", "answers"])
def test_weights_of_one_are_samples_of_the_reference(method):
    """Then it is what `core.forecast` computes from them."""
    samples = drawn(50, 0)._replace(log_weight=np.zeros(100))
    got = reweighted.optimum(objective(method), samples, 2)
    plain = forecast.Samples(samples.reward, samples.answer, samples.ref_logp)
    want = forecast.class_mass(objective(method), plain, 2, np.array([BETA]), key=jax.random.key(0), resamples=0)
    assert np.allclose(got.mass[0], want[0, 0], atol=2e-6)


def test_effective_samples_by_hand():
    """Four completions of reference 1/4 each and policy 1/2, 1/4, 1/8, 1/8: weights 1/2, 1, 2, 2, by hand."""
    ref_logp, logp = np.log(np.full(4, 0.25)), np.log([0.5, 0.25, 0.125, 0.125])
    weight = np.array([0.5, 1.0, 2.0, 2.0])
    samples = reweighted.Weighted(
        np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 1, -1, -1]), ref_logp, reweighted.log_weights(logp, ref_logp)
    )
    assert np.allclose(np.exp(samples.log_weight), weight)
    of_reference = reweighted.of_reference(samples)
    assert of_reference.effective_samples == pytest.approx(5.5**2 / (0.25 + 1 + 4 + 4))
    assert of_reference.mean_weight == pytest.approx(5.5 / 4)
    assert of_reference.standard_error == pytest.approx(np.std(weight, ddof=1) / 2)
    # To the optimum at beta = 1 / log 2 rewards of 1 double a weight: 1, 2, 2, 2.
    got = reweighted.optimum(objective("vanilla", beta=1 / np.log(2)), samples, 2)
    assert got.effective_samples == pytest.approx(7**2 / 13, rel=1e-5)
    # MARA over answers gives both answers the mass Z = exp(R / beta) x 1: "0" counts 2 x .5 as well.
    got = reweighted.optimum(objective("answers", beta=1 / np.log(2)), samples, 2)
    assert got.effective_samples == pytest.approx((2 + 2 + 2 + 2) ** 2 / 16, rel=1e-5)


def test_an_optimum_far_away_leaves_few_effective_samples():
    """One completion in a thousand has the reward that a small beta looks for: whatever n, it alone counts."""
    reward = np.append(np.full(999, 0.5), 1.0)
    samples = reweighted.Weighted(reward, np.zeros(1000, int), np.full(1000, -3.0), np.zeros(1000))
    assert reweighted.of_reference(samples).effective_samples == pytest.approx(1000)
    assert reweighted.optimum(objective("vanilla", beta=0.01), samples, 1).effective_samples == pytest.approx(1.0)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_masses_that_a_run_has_measured_are_used(direction):
    """Answers of equal mass, measured as 3 : 1, end as 1 : 3; an answer without a sample counts as half a sample."""
    reward, answer = np.ones(4), np.array([0, 0, 1, 1])
    samples = reweighted.Weighted(reward, answer, np.full(4, -1.0), np.zeros(4))
    settings = objective("answers", direction)
    log_mass_a = reweighted.measured_log_mass(settings, np.ones(4), np.array([0, 0, 0, 1]), 2)
    assert np.allclose(reweighted.optimum(settings, samples, 2, log_mass_a=log_mass_a).mass[0], [0.25, 0.75, 0])
    log_mass_a = reweighted.measured_log_mass(settings, np.ones(4), np.zeros(4, int), 2)
    assert log_mass_a[0] - log_mass_a[1] == pytest.approx(np.log(8))  # 4 samples against half a sample
    assert np.allclose(reweighted.optimum(settings, samples, 2, log_mass_a=log_mass_a).mass[0], [1 / 9, 8 / 9, 0])
    # The signal is that of training, on the same masses.
    signal, ref = augment.mara_answers(
        reward[None], samples.ref_logp[None], answer[None], log_mass_a[None], beta=BETA, threshold=THRESHOLD,
        direction=direction,
    )  # fmt: skip
    best = (targets.reverse_kl if direction == "reverse" else targets.forward_kl)(ref[0], signal[0], BETA)
    assert np.exp(np.asarray(best))[:2].sum() == pytest.approx(1 / 9, abs=1e-5)


def test_resamples_hold_the_optimum_and_are_a_function_of_the_seed():
    """Of 40 intervals of 95 % fewer than 33 hold with probability .003."""
    p = exact("vanilla", "reverse")
    inside = 0
    for seed in range(40):
        samples = drawn(300, seed)
        got = reweighted.optimum(objective("vanilla"), samples, 2, resamples=200, seed=1)
        low, high = np.quantile(got.mass[1:, 0], [0.025, 0.975])
        inside += low <= masses(p)[0] <= high
    assert got.mass.shape == (201, 3) and inside >= 33
    again = reweighted.optimum(objective("vanilla"), samples, 2, resamples=200, seed=1)
    other = reweighted.optimum(objective("vanilla"), samples, 2, resamples=200, seed=2)
    assert np.array_equal(again.mass, got.mass) and not np.array_equal(other.mass, got.mass)


def test_what_the_policy_has_unlearned_shows_in_the_mean_weight():
    """A policy on the first four completions alone: weights have the mean .6, the reference's mass there."""
    policy = np.array([[0.4, 0.2, 0.2, 0.2]])
    counts = np.rint(policy * DRAWS).astype(int)[0]
    index = np.repeat(np.arange(4), counts)
    logp, ref_logp = np.log(policy[0][index]), np.log(REF[index])
    samples = reweighted.Weighted(REWARD[index], ANSWER[index], ref_logp, reweighted.log_weights(logp, ref_logp))
    assert reweighted.of_reference(samples).mean_weight == pytest.approx(0.6)


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_at_the_threshold_is_good_though_it_was_stored_in_float32(method):
    reward = np.array([0.7, 0.7, 0.2], np.float32).astype(np.float64)
    samples = reweighted.Weighted(reward, np.array([0, 1, -1]), np.log([0.6, 0.2, 0.2]), np.log([1.8, 0.6, 0.6]))
    settings = objective(method, beta=0.1, threshold=0.7)
    got = reweighted.optimum(settings, samples, 2)
    assert got.good[0] == pytest.approx(1 / (1 + (0.25 if method == "vanilla" else 1 / 6) * np.exp(-5)), rel=1e-2)
    assert np.all(np.isfinite(reweighted.measured_log_mass(settings, reward, samples.answer, 2)))
    assert got.mass[0, 1] == pytest.approx(0.25 if method == "vanilla" else 0.5, abs=2e-3)


def test_many_rewards_and_extreme_weights_stay_finite():
    rng = np.random.default_rng(0)
    reward, log_weight = rng.normal(size=300), rng.normal(size=300) * 5
    samples = reweighted.Weighted(reward, rng.integers(-1, 40, 300), rng.normal(size=300) * 50 - 300, log_weight)
    for method in METHODS:
        for direction in ("reverse", "forward"):
            got = reweighted.optimum(objective(method, direction, 1e-3), samples, 40, resamples=3)
            assert np.all(np.isfinite(got.mass)) and np.allclose(got.mass.sum(axis=1), 1, atol=1e-4)
            assert 1 <= got.effective_samples <= 300
