"""Modifiers and means against numbers by hand."""

import math

import pytest

from mara_jax.tasks.chemistry.modifiers import (
    Clipped,
    DoubleSigmoid,
    Gaussian,
    MaxGaussian,
    MinGaussian,
    ReverseSigmoid,
    Sigmoid,
    Step,
    arithmetic_mean,
    geometric_mean,
    unchanged,
)


@pytest.mark.parametrize(
    ("modifier", "value", "score"),
    [
        (unchanged, 0.3, 0.3),
        (Clipped(0.75), 0.3, 0.4),
        (Clipped(0.75), 0.9, 1),
        (Clipped(0.75), -0.1, 0),
        (Gaussian(3, 0.5), 3, 1),
        (Gaussian(3, 0.5), 4, 0.1353352832),  # two standard deviations: exp(-2)
        (Gaussian(3, 0.5), 2, 0.1353352832),
        (MinGaussian(4, 1), -9, 1),
        (MinGaussian(4, 1), 3.5, 1),
        (MinGaussian(4, 1), 4, 1),
        (MinGaussian(4, 1), 5, 0.6065306597),  # exp(-1/2)
        (MaxGaussian(90, 10), 999, 1),
        (MaxGaussian(90, 10), 95, 1),
        (MaxGaussian(90, 10), 90, 1),
        (MaxGaussian(90, 10), 70, 0.1353352832),
        (Sigmoid(0, 10), 5, 0.5),
        (Sigmoid(0, 10), 10, 0.9467598),  # 1 / (1 + 10^-1.25)
        (Sigmoid(0, 10), 0, 0.0532402),
        (Sigmoid(0, 10, 0.5), 10, 0.9968477),  # 1 / (1 + 10^-2.5)
        (ReverseSigmoid(0, 10), 10, 0.0532402),
        (ReverseSigmoid(0, 10), 0, 0.9467598),
        (DoubleSigmoid(2, 4), 2, 0.4990010),  # 1/2 + 1 / (1 + 10^-3) - 1
        (DoubleSigmoid(2, 4), 4, 0.4990010),
        (DoubleSigmoid(2, 4), 3, 0.9386931),  # 2 / (1 + 10^-1.5) - 1
        (Step(200, 500), 200, 1),
        (Step(200, 500), 500, 1),
        (Step(200, 500), 500.1, 0),
        (Step(200), 1e9, 1),
        (Step(high=5), 5.5, 0),
    ],
)
def test_values_by_hand(modifier, value, score):
    assert modifier(value) == pytest.approx(score, abs=5e-8)


@pytest.mark.parametrize("value", [-1.0, 0.5, 2.0, 3.3, 6.0])
def test_sigmoids_are_those_of_reinvent(value):
    """In its own form: `coef_div` 100, `coef_si` and `coef_se` 150, k = .25."""
    low, high = 1.0, 4.0
    power = 10 ** (150 * value / 100)
    double = power / (power + 10 ** (150 * low / 100)) - power / (power + 10 ** (150 * high / 100))
    assert DoubleSigmoid(low, high)(value) == pytest.approx(double, abs=1e-12)
    rising = 1 / (1 + 10 ** (0.25 * (value - (high + low) / 2) * 10 / (low - high)))
    assert Sigmoid(low, high)(value) == pytest.approx(rising, abs=1e-12)
    assert ReverseSigmoid(low, high)(value) == pytest.approx(1 - rising, abs=1e-12)


@pytest.mark.parametrize("value", [-1e6, -1e300, 1e6, 1e300])
def test_extreme_values_have_a_limit_and_do_not_overflow(value):
    assert Sigmoid(0, 1)(value) == pytest.approx(float(value > 0), abs=1e-200)
    assert ReverseSigmoid(0, 1)(value) == pytest.approx(float(value < 0), abs=1e-200)
    assert DoubleSigmoid(0, 1)(value) == Gaussian(0, 1)(min(max(value, -1e9), 1e9)) == 0


def test_means_by_hand():
    assert geometric_mean([0.25, 1.0], [1, 1]) == pytest.approx(0.5)
    assert geometric_mean([0.0625, 1.0], [1, 3]) == pytest.approx(0.5)  # (1/16)^(1/4)
    assert geometric_mean([0.0625, 1.0], [10, 30]) == pytest.approx(0.5)  # weights need not sum to one
    assert geometric_mean([0.5, 0.0], [1, 1]) == 0
    assert geometric_mean([1e-200, 1e-300], [1, 1]) == pytest.approx(1e-250)  # their product is no float
    assert arithmetic_mean([0.2, 0.8], [1, 3]) == pytest.approx(0.65)
    assert arithmetic_mean([0.1], [1]) == 0.1 and math.isclose(arithmetic_mean([0.1] * 3, [1] * 3), 0.1)
