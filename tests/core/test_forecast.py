"""Predicted optima: against the closed forms on the draws themselves, hand arithmetic, and the didactic problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from mara_jax.core import augment, forecast, forecast_curves, pooled_samples, targets
from mara_jax.toy import problems

# Ten draws: rewards and answers of three kinds of string, and one without an answer.
REWARD = np.array([1, 1, 1, 1, 1, 0.5, 0.5, 0.9, 0, 0])
ANSWER = np.array([0, 0, 0, 0, 1, 0, 1, 2, -1, -1])
REF = np.log(np.array([0.2, 0.2, 0.1, 0.1, 0.01, 0.02, 0.1, 0.05, 0.1, 0.02]))
BETAS = np.array([0.05, 0.2, 1.0])


def class_masses(logp_n, answer_n, answers):
    return [float(np.exp(logp_n)[answer_n == a].sum()) for a in range(answers)] + [
        float(np.exp(logp_n)[answer_n < 0].sum())
    ]


def masses(name, direction, resamples=0, reward=REWARD, answer=ANSWER, answers=3, **kwargs):
    samples = forecast.Samples(reward, answer, kwargs.pop("ref_logp", REF), kwargs.pop("exact", False))
    objective, beta_b = forecast.Objective(name, direction, 0.1, 0.8), kwargs.pop("betas", BETAS)
    return forecast.class_mass(objective, samples, answers, beta_b, key=jax.random.key(0), resamples=resamples)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_vanilla_is_the_optimum_on_the_draws(direction):
    optimum = targets.reverse_kl if direction == "reverse" else targets.forward_kl
    even = jnp.full(10, -np.log(10))
    got = masses("vanilla", direction)[:, 0]
    for beta, mass in zip(BETAS, got, strict=True):
        assert np.allclose(mass, class_masses(optimum(even, REWARD, beta), ANSWER, 3), atol=2e-6)


def test_mara_over_answers_is_the_target_on_the_draws():
    even = jnp.full(10, -np.log(10))
    got = masses("answers", "reverse")[:, 0]
    for beta, mass in zip(BETAS, got, strict=True):
        want = targets.mara_answers(even, REWARD, ANSWER, beta, 0.8)
        assert np.allclose(mass, class_masses(want, ANSWER, 3), atol=2e-6)
    # Forward: R(z) is the likeliest string's; equal good rewards leave no choice of z.
    reward = np.where(REWARD >= 0.8, 1.0, REWARD)
    got = masses("answers", "forward", reward=reward)[:, 0]
    for beta, mass in zip(BETAS, got, strict=True):
        want = targets.mara_answers(even, reward, ANSWER, beta, 0.8, direction="forward")
        assert np.allclose(mass, class_masses(want, ANSWER, 3), atol=2e-6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_mara_over_strings_counts_strings(direction):
    """Draws in exact proportion to the reference: weights 1 / ref make each string count once."""
    ref = np.array([0.5, 0.25, 0.125, 0.125])
    reward, answer = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 1, -1])
    drawn = np.repeat(np.arange(4), (ref * 8).astype(int))
    got = masses(
        "strings", direction, reward=reward[drawn], answer=answer[drawn], answers=2, ref_logp=np.log(ref)[drawn]
    )[:, 0]  # fmt: skip
    for beta, mass in zip(BETAS, got, strict=True):
        want = targets.mara(np.log(ref), reward, beta, 0.8, direction)
        assert np.allclose(mass, class_masses(want, answer, 2), atol=2e-6)


@pytest.mark.parametrize("name", ["vanilla", "strings"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_enumerated_outcomes_give_the_target_itself(name, direction):
    problem = problems.figure6()
    betas = np.array([0.01, 1.0])
    got = masses(
        name, direction, reward=problem.reward, answer=np.arange(100), answers=100, ref_logp=problem.ref_logp,
        betas=betas, exact=True,
    )[:, 0]  # fmt: skip
    for beta, mass in zip(betas, got, strict=True):
        optimum = {"reverse": targets.reverse_kl, "forward": targets.forward_kl}[direction]
        want = optimum(problem.ref_logp, problem.reward, beta)
        if name == "strings":
            want = targets.mara(problem.ref_logp, problem.reward, beta, 0.8, direction)
        assert np.allclose(mass[:-1], np.exp(want), atol=2e-6) and mass[-1] == 0


def test_fast_forward_optimum_equals_the_bisected_one():
    rng = np.random.default_rng(0)
    optimum = jax.jit(pooled_samples._optimum, static_argnums=3)
    reward = {0: rng.random, 1: lambda n: np.round(rng.random(n)), 2: np.zeros}
    with jax.enable_x64(True):
        for trial in range(60):
            count = int(rng.choice([1, 2, 7, 19]))  # every other size is two more programs to compile
            log_weight, beta = rng.normal(0, [0.1, 3, 30][trial % 3], count), 10 ** rng.uniform(-3, 1)
            gains = reward[trial % 3](count)
            got = optimum(jnp.asarray(log_weight), jnp.asarray(gains), beta, "forward")
            assert np.allclose(np.exp(got), np.exp(targets.forward_kl(log_weight, gains, beta)), atol=1e-12)


def test_log_mass_is_that_of_training():
    groups = pooled_samples.pool(REWARD, ANSWER, 4)
    weight = pooled_samples.log_weights(np.full(10, -np.log(10)), groups, jax.random.key(0), 0)[0]
    for direction in ("reverse", "forward"):
        want = augment.answer_log_mass(REWARD[None], ANSWER[None], 4, 0.3, 0.8, direction)[0]
        got = pooled_samples.answer_log_mass(weight, groups.reward, groups.answer, 4, 0.3, 0.8, direction)
        assert np.allclose(got, want, atol=1e-6) and got[3] == -np.inf


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_optimum_is_where_training_with_these_masses_ends(direction):
    """Ten samples and the half one of an answer that they lack, optimised by exact gradients of the training signal."""
    reward, answer = np.append(REWARD, 1.0), np.append(ANSWER, 3)
    ref = np.log(np.append(np.full(10, 0.1), 0.05))
    settings = {"beta": 0.3, "threshold": 0.8, "direction": direction}
    log_mass = augment.answer_log_mass(REWARD[None], ANSWER[None], 4, **settings)
    unseen = augment.unseen_log_mass(REWARD[None], **settings)
    # The anchor's reward, for "forward", is that of the likeliest string: ties here go to the best reward, 1.
    signal, ref_hat = augment.mara_answers(
        reward[None], ref[None], answer[None], log_mass, unseen_log_mass=unseen, **settings
    )

    def loss(logits):
        logp = jax.nn.log_softmax(logits)
        if direction == "forward":
            return -jnp.sum(jnp.exp(logp) * signal[0]) - 0.3 * jnp.sum(jnp.exp(ref_hat[0]) * logp)
        return -jnp.sum(jnp.exp(logp) * (signal[0] - 0.3 * (logp - ref_hat[0])))

    with jax.enable_x64(True):
        trained = optimize.minimize(jax.value_and_grad(loss), ref, jac=True, options={"gtol": 1e-7}).x
    objective = forecast.Objective("answers", direction, 0.3, 0.8)
    got = np.exp(
        forecast.class_log_mass(objective, [forecast.Samples(REWARD, ANSWER)], forecast.Task(("a", "b", "c", "d")))
    )
    assert np.allclose(got, class_masses(jax.nn.log_softmax(trained), answer, 4), atol=2e-5)
    assert np.allclose(got[:4], got[3], rtol=0.4)  # near each other; bad strings of a and b are no part of their mass


def test_an_unseen_answer_has_half_a_sample_in_the_bootstrap():
    """Its row gives it Wilson's most; the run had measured half a sample of six, the others three each."""
    reward, answer = np.ones(6), np.repeat([0, 1], 3)
    beta_b = np.array([0.1])
    for direction in ("reverse", "forward"):
        mass = masses("answers", direction, 5, reward=reward, answer=answer, ref_logp=None, betas=beta_b)
        most = 1.959964**2 / (6 + 1.959964**2)
        lifted = np.array([0.5, 0.5, most * 6, 0])
        assert np.allclose(mass[0, -1], lifted / lifted.sum(), atol=1e-5)


def test_log_masses_keep_what_probabilities_cannot():
    groups = pooled_samples.pool(REWARD, ANSWER, 3)
    weight = pooled_samples.log_weights(np.full(10, -np.log(10)), groups, jax.random.key(0), 0)[0]
    got = pooled_samples.optimum_log_mass(weight, groups.reward, groups.answer, 3, 1e-3, "reverse")
    assert got[3] == pytest.approx(np.log(2 / 5) - 1000, rel=1e-6)  # two without answer, five of reward 1


def test_resamples_are_multinomial_and_rows_stay_as_they_are():
    groups = pooled_samples.pool(REWARD, ANSWER, 3)
    log_weight = np.full(10, -np.log(10))
    rows = np.exp(pooled_samples.log_weights(log_weight, groups, jax.random.key(1), 4000))
    share = np.bincount(groups.index) / 10
    assert np.allclose(rows[0], share, atol=1e-6) and np.allclose(rows.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(rows[1:].mean(axis=0), share, atol=0.01)
    assert np.allclose(np.cov(rows[1:].T), (np.diag(share) - np.outer(share, share)) / 10, atol=2e-3)
    fewer = np.exp(pooled_samples.log_weights(log_weight, groups, jax.random.key(1), 100))
    assert np.array_equal(fewer, rows[:101])


def test_an_answer_never_drawn_gets_what_the_draws_allow():
    """Two answers, one never seen in 100 draws: Wilson's upper end, 3.7 %, is the most it may have (z^2/(n+z^2))."""
    reward, answer = np.ones(100), np.zeros(100, int)
    mass = masses("vanilla", "reverse", 200, reward=reward, answer=answer, answers=2, ref_logp=None)
    read = forecast_curves.summarise(mass, 200)
    most = 1.959964**2 / (100 + 1.959964**2)
    assert read.share[1].tolist() == [1.0, 0.0]
    assert read.share_high[1, 1] == pytest.approx(most / (1 + most), rel=1e-4)
    assert read.share_low[1, 0] == pytest.approx(1 / (1 + most), rel=1e-4)


def test_readings_of_hand_made_masses():
    mass = np.array([[[0.6, 0.2, 0.2], [0.5, 0.5, 0.0], [0.8, 0.0, 0.2]]])
    read = forecast_curves.summarise(mass, 2)
    assert np.allclose(read.share[0], [0.75, 0.25]) and np.isclose(read.top[0], 0.75)
    assert read.number[0] == pytest.approx(4 / 3**0.75)  # exp of the entropy of (3/4, 1/4)
    assert read.number_low[0] == pytest.approx(1.025) and read.number_high[0] == pytest.approx(1.975)
    assert read.top_low[0] == pytest.approx(0.5125) and read.mass_high[0].tolist() == pytest.approx(
        [0.7925, 0.4875, 0.195]
    )


def test_crossings_find_the_paper_s_flips():
    """Figure 2: reverse at .25 / 1.9 = .1316 (Eq. 11), forward near .65; rewards of both peaks at the outcomes' own."""
    problem = problems.figure2()
    betas = forecast_curves.beta_grid(problem.reward, 0.1)
    for direction, want in (("reverse", None), ("forward", 0.65)):
        mass = masses(
            "vanilla", direction, reward=problem.reward, answer=np.arange(100), answers=100, ref_logp=problem.ref_logp,
            betas=betas, exact=True,
        )[:, 0]  # fmt: skip
        found = forecast_curves.crossings(betas, np.log(mass[:, 79]) - np.log(np.maximum(mass[:, 20], 1e-30)))
        if want is None:
            want = float(
                targets.tie_beta(problem.ref_logp[20], problem.reward[20], problem.ref_logp[79], problem.reward[79])
            )
            assert want == pytest.approx(0.1316, abs=2e-3)
        assert found == pytest.approx([want], rel=1e-3 if direction == "reverse" else 0.02)


def test_crossings_ignore_rounding_and_start_where_the_sign_does():
    betas = np.array([0.1, 0.2, 0.5, 1.0])
    assert forecast_curves.crossings(betas, np.array([1e-6, -1e-6, 1e-6, -1e-6])) == []
    assert forecast_curves.crossings(betas, np.array([1.0, 0.0, 0.0, 0.5])) == []
    # Linear in 1 / beta: 3 - x crosses 0 at 1 / beta = 3.
    assert forecast_curves.crossings(betas, 3.0 - 1 / betas) == pytest.approx([1 / 3])
    assert forecast_curves.crossings(betas, np.array([-np.inf, -1.0, 1.0, 2.0])) == pytest.approx([1 / 3.5])


def test_interval_of_a_crossing():
    betas = np.array([0.1, 0.2, 0.5, 1.0])
    rows = np.array([level - 1 / betas for level in np.linspace(2, 4, 41)] + [np.ones(4)] * 41)
    low, high, held = forecast_curves.crossing_interval(1 / 3, betas, rows)
    assert held == 0.5 and low == pytest.approx(0.253, abs=2e-3) and high == pytest.approx(0.488, abs=2e-3)
    assert forecast_curves.crossing_interval(1 / 3, betas, np.ones((5, 4))) == (None, None, 0.0)


def test_effective_samples():
    assert pooled_samples.effective_samples(np.zeros(7)) == pytest.approx(7)
    assert pooled_samples.effective_samples(np.array([700.0, 0, -np.inf])) == pytest.approx(1)
    assert pooled_samples.effective_samples(np.log([3.0, 1.0])) == pytest.approx(1.6)
    assert pooled_samples.effective_samples(np.array([-np.inf])) == 0


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_many_rewards_are_filled_up_without_a_trace(direction):
    """Forty draws of forty rewards, one answer of three unseen, one draw in four without an answer."""
    rng = np.random.default_rng(0)
    reward, answer = rng.random(40), np.where(rng.random(40) < 0.25, -1, rng.integers(0, 2, 40))
    groups = pooled_samples.pool(reward, answer, 3)
    assert len(groups.reward) == 41 and groups.unseen == (40,)
    reward[5:30] = 0.5  # fewer groups, the same shape
    groups = pooled_samples.pool(reward, answer, 3)
    assert len(groups.reward) == 41 and len(np.unique(groups.index)) < 20
    optimum = targets.reverse_kl if direction == "reverse" else targets.forward_kl
    want = class_masses(optimum(np.full(40, -np.log(40)), reward, 0.2), answer, 3)
    got = masses("vanilla", direction, reward=reward, answer=answer, ref_logp=None, betas=np.array([0.2]))
    assert np.allclose(got[0, 0], want, atol=2e-6)
    weighed = np.append(np.full(40, -np.log(40)), np.log(0.5 / 40))
    logp = optimum(weighed, np.append(reward, reward.max()), 0.2)
    objective = forecast.Objective("vanilla", direction, 0.2, 0.8)
    logs = forecast.class_log_mass(objective, [forecast.Samples(reward, answer)], forecast.Task(("a", "b", "c")))
    assert np.allclose(np.exp(logs), class_masses(logp, np.append(answer, 2), 3), atol=2e-6)
