"""The guess a healing's curve makes: exact where a power law made the points, silent where they say nothing."""

import numpy as np
import pytest

from mka.healing.curve import fit_power_law, predict


def make_curve(values, step=1000):
    return [{"tokens": step * i, "heldout": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(("floor", "scale", "exponent"), [(0.2, 3.0, 0.4), (0.0, 1.5, 0.25), (0.35, 40.0, 1.0)])
def test_a_power_law_is_found_and_continued(floor, scale, exponent):
    tokens = np.array([1000, 2000, 4000, 8000, 16000, 32000])
    losses = floor + scale * tokens.astype(float) ** -exponent
    assert fit_power_law(tokens, losses) == pytest.approx((floor, scale, exponent), abs=1e-2, rel=1e-2)
    curve = [{"tokens": int(n), "heldout": float(value)} for n, value in zip(tokens, losses)]
    guess = predict([{"tokens": 0, "heldout": 9.0}, *curve])
    assert guess == {
        "64000": pytest.approx(floor + scale * 64000.0**-exponent, rel=1e-3),
        "320000": pytest.approx(floor + scale * 320000.0**-exponent, rel=1e-3),
    }


def test_it_never_goes_below_nothing():
    guess = predict(make_curve([1.0, 0.5, 0.2, 0.05, 0.01]))
    assert all(value >= 0 for value in guess.values())


@pytest.mark.parametrize("values", [[0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.4, 0.4, 0.4], [0.5, 0.3, 0.35, 0.36, 0.37]])
def test_too_few_points_or_none_that_fall_say_nothing(values):
    assert predict(make_curve(values)) == {}


def test_points_that_were_not_measured_are_passed_over():
    curve = make_curve([0.9, 0.5, 0.4, 0.35, 0.32])
    mixed = sorted([*curve, {"tokens": 1500, "loss": 7.0}], key=lambda point: point["tokens"])
    assert predict(mixed) == predict(curve) != {}
