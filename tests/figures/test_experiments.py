"""The didactic experiments: exact optima, trainings that reach them, and checks that notice what is wrong."""

import copy
import dataclasses

import numpy as np
import pytest
from scipy import optimize

from mara_jax.figures import computation, expectations, experiments
from mara_jax.toy import problems

SMALL = problems.Problem("small", np.log([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 1.0, 1.0, 0.0]), 0.8)
PROBLEM_FIGURES = tuple(computation.FIGURES)


@pytest.fixture(scope="module")
def converged():
    return {name: computation.record(name, "converged") for name in computation.NAMES}


def panels_of(record):
    return {(panel["objective"], panel["beta"]): panel for panel in record["panels"]}


# Problems


def test_the_small_problems_are_those_of_the_paper():
    np.testing.assert_allclose(np.exp(problems.iclr3().ref_logp), np.full(3, 1 / 3))
    np.testing.assert_allclose(np.exp(problems.iclr4().ref_logp), [0.68, 0.30, 0.02])
    for make in problems.PROBLEMS.values():
        problem = make()
        np.testing.assert_allclose(np.exp(problem.ref_logp).sum(), 1.0)
        assert np.any(problem.reward >= problem.threshold)


def test_both_bumps_of_figure_four_count_as_good():
    for left in (0.75, 0.9):
        problem = problems.figure4(left)
        good = np.flatnonzero(problem.reward >= problem.threshold)
        assert {20, 79} <= set(good)


# Optima


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_the_optimum_of_the_misused_reward_by_another_solver(beta):
    """Forward KL with Algorithm 1's reward: beta ref / (Lambda - Rbar), Lambda by scipy."""
    p = problems.figure6()
    good, ref = p.reward >= p.threshold, np.exp(p.ref_logp)
    anchor = np.flatnonzero(good)[np.argmax(ref[good])]
    lifted = np.where(good, p.reward[anchor] + beta * (p.ref_logp[anchor] - p.ref_logp), p.reward)
    best = lifted.max()
    root = optimize.brentq(
        lambda gap: np.sum(beta * ref / (best + gap - lifted)) - 1, beta * ref[np.argmax(lifted)] / 2, beta, xtol=1e-15
    )
    want = beta * ref / (best + root - lifted)
    got = np.exp(experiments.optimum(p, experiments.OBJECTIVES["algorithm1_forward"], beta))
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert np.argmax(got) == 74 and 0.79 < got[74] < 0.83


def test_flips_are_where_the_closed_form_puts_them():
    p = problems.figure2()
    tie = (p.reward[79] - p.reward[20]) / (p.ref_logp[20] - p.ref_logp[79])
    np.testing.assert_allclose(expectations.flip_beta(p, experiments.OBJECTIVES["reverse"]), tie, atol=2e-6)
    np.testing.assert_allclose(tie, 0.25 / 1.9, atol=2e-4)


# Training


@pytest.mark.parametrize("name", ["mara_forward", "algorithm1_forward"])
def test_large_batches_follow_the_exact_gradient(name):
    """With thousands of draws a step, the sampled training walks where the exact one does."""
    objective, betas = experiments.OBJECTIVES[name], (0.3, 1.0)
    settings = experiments.Settings("sampled", learning_rate=1e-2, steps=150, batch=8192)
    sampled = experiments.train(SMALL, objective, betas, settings)
    exact = experiments.train(SMALL, objective, betas, dataclasses.replace(settings, gradients="exact"))
    assert np.max(np.abs(np.exp(sampled) - np.exp(exact))) < 0.02
    # It has moved, so that following is worth something.
    assert np.min(np.max(np.abs(np.exp(exact) - 0.25), axis=-1)) > 0.1


def test_alone_in_its_batch_a_sample_is_its_own_anchor():
    """With one draw a step Algorithm 1 in the batch changes nothing: what is left is the plain forward KL.

    Draws of both are those of `toy.training`, so the two trainings are the same, step by step.
    """
    for batch in (1, 8):
        settings = experiments.Settings("sampled", learning_rate=1e-2, steps=200, batch=batch)
        plain, augmented = (
            np.exp(experiments.train(SMALL, experiments.OBJECTIVES[name], (0.3, 1.0), settings))
            for name in ("forward", "algorithm1_forward")
        )
        apart = np.max(np.abs(plain - augmented), axis=-1)
        assert np.all(apart < 1e-5) if batch == 1 else np.all(apart > 0.01)


def test_distances_by_hand():
    got = computation.distances(np.log([0.5, 0.5]), np.log([0.75, 0.25]), np.array([True, False]))
    assert got["tv_to_optimum"] == pytest.approx(0.25)
    assert got["kl_trained_to_optimum"] == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))
    assert got["kl_optimum_to_trained"] == pytest.approx(0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5))
    assert got["tv_to_uniform_good"] == pytest.approx(0.5)
    assert got["optimum_tv_to_uniform_good"] == pytest.approx(0.25)


# Figures


@pytest.mark.parametrize("name", computation.NAMES)
def test_every_figure_shows_what_it_must_when_converged(converged, name):
    record = converged[name]
    assert [check["name"] for check in record["checks"] if not check["pass"]] == []
    assert max(panel["tv_to_optimum"] for panel in record["panels"]) < 0.02


def test_figures_hold_all_betas_and_both_kls(converged):
    betas = {1.0, 0.5, 0.25, 0.2, 0.15, 0.132, 0.10, 0.05, 0.025, 0.01}
    for name in ("2", "4", "5", "6"):
        keys = panels_of(converged[name]).keys()
        objectives = {key for key, _ in keys}
        assert {"reverse", "forward"} <= objectives
        assert set(keys) == {(key, beta) for key in objectives for beta in betas}
    assert len({key for key, _ in panels_of(converged["6"])}) == 5


def test_published_numbers_are_among_the_checks(converged):
    """By value, so that a check that is dropped or loosened is missed here."""
    expected = {
        "2": [0.1315, 0.65, 0.0291, 0.0056, 0.0951, 0.0752, 0.0808, 0.1468, 0.7362, 0.1525, 0.9816, 1.2938, 0.99921],
        "3": [2.69e43],
        "5": [6.686],
        "6": [0.0616, 0.00385, 0.0200, 0.01939, 0.01996, 0.01884, 0.81],
        "iclr3": [0.069, 0.419, 0.512, 1.0],
        "iclr4": [0.9375, 0.0625, 15.0],
    }
    for name, numbers in expected.items():
        for number in numbers:
            own = [
                check
                for check in converged[name]["checks"]
                if check["expected"] == number and check["relation"] == "=" and check["name"].startswith(("opt", "how"))
            ]
            assert own, (name, number)
            assert min(check["tolerance"] / number for check in own) < 0.03


@pytest.mark.parametrize("name", PROBLEM_FIGURES)
def test_checks_notice_distributions_turned_around(converged, name):
    panels = copy.deepcopy(panels_of(converged[name]))
    for panel in panels.values():
        panel["optimum"].reverse()
        panel["trained"].reverse()
    checks = expectations.figure_checks(name, computation.FIGURES[name].problem(), panels, "converged")
    from_panels = ("optimum", "the same from the optimum")
    assert any(not check["pass"] and check["name"].startswith(from_panels) for check in checks)
    assert any(not check["pass"] and check["name"].startswith("trained") for check in checks)


@pytest.mark.parametrize("kind", ["optimum", "trained"])
@pytest.mark.parametrize("name", ["2", "5", "6", "iclr3", "iclr4"])
def test_checks_notice_a_few_percent_of_the_uniform(converged, name, kind):
    """Two percent of the mass spread evenly in every optimum, eight in what was trained."""
    share = 0.02 if kind == "optimum" else 0.08
    panels = copy.deepcopy(panels_of(converged[name]))
    for panel in panels.values():
        p_a = np.array(panel[kind])
        panel[kind] = list((1 - share) * p_a + share / len(p_a))
    checks = expectations.figure_checks(name, computation.FIGURES[name].problem(), panels, "converged")
    assert any(not check["pass"] and check["name"].startswith(kind) for check in checks)


def test_the_misused_reward_does_not_pass_as_mara(converged):
    panels = panels_of(converged["6"])
    swapped = dict(panels)
    for beta in experiments.BETAS:
        swapped["mara_forward", beta] = panels["algorithm1_forward", beta]
        swapped["algorithm1_forward", beta] = panels["mara_forward", beta]
    failed = [
        c["name"] for c in expectations.figure_checks("6", problems.figure6(), swapped, "converged") if not c["pass"]
    ]
    for beta in experiments.BETAS:
        assert any(name.startswith(f"optimum, mara_forward, beta {beta:g}:") for name in failed)
        assert any(name.startswith(f"trained, algorithm1_forward, beta {beta:g}:") for name in failed)


def test_a_check_says_what_it_measured():
    assert expectations.near("x", 1.05, 1.0, 0.1)["pass"] and not expectations.near("x", 1.2, 1.0, 0.1)["pass"]
    assert expectations.at_least("x", 1.0, 1.0)["pass"] and not expectations.at_least("x", 0.9, 1.0)["pass"]
    assert expectations.at_most("x", 1.0, 1.0)["pass"] and not expectations.at_most("x", 1.1, 1.0)["pass"]
    for check in (expectations.near, expectations.at_least, expectations.at_most):
        arguments = ("x", float("nan"), 1.0, *((0.1,) if check is expectations.near else ()))
        assert not check(*arguments)["pass"]


def test_unknown_figures_and_modes_are_refused():
    with pytest.raises(ValueError, match=r"figure '7'.*1, 2, 3, 4, 5, 6, iclr3, iclr4"):
        computation.record("7", "faithful")
    with pytest.raises(ValueError, match=r"mode 'quick'.*faithful or converged"):
        computation.record("2", "quick")
