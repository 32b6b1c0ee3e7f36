"""Masses of good answers at an optimum, and the rule by which one is lost: by hand, against the forecast, simulated."""

import numpy as np
import pytest

from mara_jax.core import forecast, modes
from mara_jax.core.forecast import Objective

THREE = np.array([1.0] * 9 + [0.0]), np.array([0] * 6 + [1] * 3 + [-1])  # six a, three b, one without an answer


def test_masses_at_the_optimum_by_hand():
    """Vanilla keeps 6 : 3 and gives none e^-10 of its share; MARA over answers makes good answers equally likely."""
    vanilla, mara = (Objective(method, "reverse", 0.1, 0.8) for method in ("vanilla", "answers"))
    rest = np.exp(-10)
    np.testing.assert_allclose(modes.optimum_mass(vanilla, *THREE, 2), np.array([6, 3]) / (9 + rest))
    np.testing.assert_allclose(modes.optimum_mass(mara, *THREE, 2), np.array([6, 6]) / (12 + rest))
    # A third answer, unseen, counts as half a sample.
    np.testing.assert_allclose(modes.optimum_mass(vanilla, *THREE, 3), np.array([6, 3, 0.5]) / (9.5 + rest))
    np.testing.assert_allclose(modes.optimum_mass(mara, *THREE, 3), np.array([6, 6, 6]) / (18 + rest))


def test_only_good_completions_of_an_answer_count():
    """Of four that give a two are good: the others keep their reward of 0, whatever MARA adds to good ones."""
    reward, answer = np.array([1.0, 1, 0, 0, 1]), np.array([0, 0, 0, 0, 1])
    mara = Objective("answers", "reverse", 1.0, 0.8)
    np.testing.assert_allclose(modes.optimum_mass(mara, reward, answer, 2), np.array([2, 2]) / (4 + 2 * np.exp(-1)))
    with pytest.raises(ValueError, match="no sample of the reference policy is good"):
        modes.optimum_mass(mara, reward * 0.5, answer, 2)
    with pytest.raises(ValueError, match="MARA over strings is not known"):
        modes.optimum_mass(mara._replace(method="strings"), reward, answer, 2)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("method", ["vanilla", "answers"])
@pytest.mark.parametrize("beta", [0.02, 0.5])
def test_masses_are_those_of_the_forecast(direction, method, beta):
    """Graded rewards, five answers of which the last has no sample; good answers are good throughout."""
    draw = np.random.default_rng(0)
    answer = draw.choice([-1, 0, 1, 2, 3], size=40, p=[0.3, 0.4, 0.15, 0.1, 0.05])
    reward = np.where(answer < 0, 0.2, 0.5 + 0.1 * answer)
    reward[answer == 3] = 0.9
    objective = Objective(method, direction, beta, 0.45)
    task = forecast.Task(tuple("abcde"))
    expected = forecast.class_log_mass(objective, [forecast.Samples(reward, answer)], task)
    assert expected is not None
    np.testing.assert_allclose(modes.optimum_mass(objective, reward, answer, 5), np.exp(expected)[:5], rtol=2e-4)


def test_the_chance_of_missing_by_hand():
    """(1 + e / c)^-c with e = .1 x optimum x missed: 99 expected after one sighting, 18 after two, 4.605 after many."""
    assert modes.chance_of_missing(990, 1.0, 1) == pytest.approx(0.01)
    assert modes.chance_of_missing(180, 1.0, 2) == pytest.approx(0.01)
    assert modes.chance_of_missing(92, 0.5, 10**9) == pytest.approx(np.exp(-4.6))
    assert modes.is_lost(93, 0.5, 10**9) and not modes.is_lost(92, 0.5, 10**9)
    assert modes.is_lost(181, 1.0, 2) and not modes.is_lost(179, 1.0, 2)
    assert modes.chance_of_missing(0, 0.5, 3) == 1.0


def alarm_rate(share: float, samples: int, of_optimum: float, runs: int = 4000) -> float:
    """How often an answer of this share is called lost before the policy gives it once, where vanilla's optimum has
    the same share, the policy `of_optimum` of it, and both are sampled."""
    draw = np.random.default_rng(1)
    sightings, given_after = draw.binomial(samples, share, runs), draw.geometric(of_optimum * share, runs) - 1
    alarms = [
        modes.is_lost(missed, count / samples, count)
        for count, missed in zip(sightings.tolist(), given_after.tolist(), strict=True)
        if count
    ]
    return sum(alarms) / runs


@pytest.mark.parametrize(("share", "samples"), [(0.5, 256), (0.1, 256), (0.02, 256), (0.5, 16), (0.2, 16), (0.1, 16)])
def test_sampling_noise_sets_off_few_false_alarms(share, samples):
    """Just at a tenth at most 1.5 % (1 % and the noise of 4,000 runs); at a fifth a tenth of that; at the optimum none;
    of an answer that is gone, all that samples have shown."""
    assert alarm_rate(share, samples, modes.SHARE) <= 0.015
    assert alarm_rate(share, samples, 2 * modes.SHARE) <= 0.003
    assert alarm_rate(share, samples, 1.0) == 0
    assert alarm_rate(share, samples, 1e-9) >= 1 - (1 - share) ** samples - 0.02
