"""Figure 1's fits against closed forms, and against the best member of the family found by enumeration."""

import numpy as np
import pytest

from mara_jax.figures import figure1

LONG = {"learning_rate": 5e-2, "steps": 4000}


def total_variation(logp_a, other_logp_a):
    return np.abs(np.exp(logp_a) - np.exp(other_logp_a)).sum() / 2


def test_the_mixture_by_hand():
    """Weights .6 and .4 at -3 and 3 with deviation .6: mean -.6, variance .36 + 9 - .36 = 9."""
    mixture = figure1.Mixture()
    np.testing.assert_allclose(mixture.moments, (-0.6, 3.0), atol=1e-12)
    np.testing.assert_allclose(np.exp(mixture.logp_a).sum(), 1.0, atol=1e-12)
    # The grid carries the density: its own moments are those of the closed form.
    np.testing.assert_allclose(figure1.moments(mixture.logp_a, mixture.x_a), (-0.6, 3.0), atol=1e-9)
    # Density at the heavier mode, over that at the lighter: .6 / .4.
    at = [int(np.argmin(np.abs(mixture.x_a - m))) for m in mixture.mean]
    np.testing.assert_allclose(np.exp(mixture.logp_a[at[0]] - mixture.logp_a[at[1]]), 1.5, atol=1e-6)


def test_the_forward_gaussian_matches_the_targets_moments():
    """The maximum-likelihood member of an exponential family has the target's moments; other weights too."""
    for mixture in (figure1.Mixture(), figure1.Mixture((0.25, 0.75), (-1.0, 2.0), (0.5, 1.5))):
        _, fitted_a = figure1.fit(mixture.logp_a, mixture.x_a, "gaussian", "forward", **LONG)
        np.testing.assert_allclose(figure1.moments(fitted_a, mixture.x_a), mixture.moments, atol=2e-5)


def test_the_reverse_gaussian_sits_on_the_heavier_mode():
    mixture = figure1.Mixture()
    params, fitted_a = figure1.fit(mixture.logp_a, mixture.x_a, "gaussian", "reverse", **LONG)
    np.testing.assert_allclose([params[0], np.exp(params[1])], [-3.0, 0.6], atol=1e-4)
    # Where q lives the target is .6 q: KL(q || target) = -log .6.
    reverse_kl = np.sum(np.exp(fitted_a) * (fitted_a - mixture.logp_a))
    np.testing.assert_allclose(reverse_kl, -np.log(0.6), atol=1e-4)
    assert np.exp(fitted_a)[mixture.x_a > 0].sum() < 1e-6


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_descent_ends_at_the_best_gaussian_of_all(direction):
    mixture = figure1.Mixture()
    params, _ = figure1.fit(mixture.logp_a, mixture.x_a, "gaussian", direction, **LONG)
    np.testing.assert_allclose(params, figure1.best_gaussian(mixture.logp_a, mixture.x_a, direction), atol=1e-5)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_enumeration_finds_a_gaussian_that_is_the_target(direction):
    x_a = figure1.Mixture().x_a
    for mean, deviation in ((1.3, 0.8), (-4.0, 2.5)):
        target_a = figure1.gaussian_logp(np.array([mean, np.log(deviation)]), x_a)
        best = figure1.best_gaussian(target_a, x_a, direction)
        np.testing.assert_allclose(best, [mean, np.log(deviation)], atol=1e-5)


def test_the_reverse_kl_has_a_covering_minimum_that_enumeration_sees_through(monkeypatch):
    """From a wide start the descent stays wide, at a larger KL than that of the best Gaussian."""
    mixture = figure1.Mixture()
    monkeypatch.setattr(figure1, "_START", (0.0, 1.0))
    params, fitted_a = figure1.fit(mixture.logp_a, mixture.x_a, "gaussian", "reverse", **LONG)
    assert np.exp(params[1]) > 2
    assert np.sum(np.exp(fitted_a) * (fitted_a - mixture.logp_a)) > 2 * -np.log(0.6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_free_categorical_matches_any_target_under_both(direction):
    mixture = figure1.Mixture((0.3, 0.7), (-2.0, 4.0), (1.5, 0.8))
    _, fitted_a = figure1.fit(mixture.logp_a, mixture.x_a, "categorical", direction, **LONG)
    assert total_variation(fitted_a, mixture.logp_a) < 2e-3


def test_what_is_not_known_is_refused():
    mixture = figure1.Mixture()
    with pytest.raises(ValueError, match="family 'cauchy' is not known: use one of gaussian, categorical"):
        figure1.fit(mixture.logp_a, mixture.x_a, "cauchy", "reverse", **LONG)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'sideways'"):
        figure1.fit(mixture.logp_a, mixture.x_a, "gaussian", "sideways", **LONG)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'sideways'"):
        figure1.best_gaussian(mixture.logp_a, mixture.x_a, "sideways")  # type: ignore[arg-type]
