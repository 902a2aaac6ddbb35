"""Bits under a budget: held against trying everything."""

import itertools

import numpy as np
import pytest

from mka.errors import RecipeError
from mka.transforms.allocation import allocate


def draw(units, options, seed):
    """Damage that falls with bits, by another factor in each unit; whole bits."""
    random = np.random.default_rng(seed)
    damage = np.sort(random.exponential(size=(units, options)) * random.exponential(size=(units, 1)), axis=1)[:, ::-1]
    bits = np.sort(random.integers(10, 1000, size=(units, options)), axis=1)
    return damage, bits


@pytest.mark.parametrize("seed", range(8))
def test_nothing_else_within_the_budget_loses_less(seed):
    damage, bits = draw(6, 4, seed)
    budget = 0.5 * (bits.min(axis=1).sum() + bits.max(axis=1).sum())
    found = allocate(damage, bits, budget)
    rows = np.arange(6)
    least = min(
        damage[rows, list(chosen)].sum()
        for chosen in itertools.product(range(4), repeat=6)
        if bits[rows, list(chosen)].sum() <= budget
    )
    assert bits[rows, found].sum() <= budget
    assert damage[rows, found].sum() == pytest.approx(least, rel=1e-9)


def test_the_ends():
    damage, bits = draw(5, 3, 0)
    assert allocate(damage, bits, bits.max(axis=1).sum()).tolist() == damage.argmin(axis=1).tolist()
    assert allocate(damage, bits, bits.min(axis=1).sum()).tolist() == bits.argmin(axis=1).tolist()
    with pytest.raises(RecipeError, match="the smallest rounding takes"):
        allocate(damage, bits, bits.min(axis=1).sum() - 1)


def test_bits_go_to_what_is_dear():
    """Two units alike but for their price: the one a hundred times as dear has the larger option."""
    damage = np.array([[4.0, 1.0], [400.0, 100.0]])
    assert allocate(damage, np.array([[2, 3], [2, 3]]), 5).tolist() == [0, 1]


def test_as_many_as_a_large_model_has():
    damage, bits = draw(500, 7, 1)
    budget = 0.4 * (bits.min(axis=1).sum() + bits.max(axis=1).sum())
    found = allocate(damage, bits, budget)
    assert found.shape == (500,) and bits[np.arange(500), found].sum() <= budget


def test_damage_that_is_nothing_or_measured_below_it_takes_the_fewest_bits():
    bits = np.array([[2, 4, 8], [2, 4, 8]])
    assert allocate(np.zeros((2, 3)), bits, 16).tolist() == [0, 0]
    assert allocate(np.array([[-1e-9, -1e-9, -2e-9], [1.0, 0.5, 0.0]]), bits, 12).tolist() == [0, 2]


def test_near_the_top_of_the_budget_small_damages_are_told_apart():
    """Damage falls by four with every bit, so what is left to choose is a thousandth of the largest."""
    random = np.random.default_rng(3)
    damage = random.exponential(size=(6, 1)) * 4.0 ** -np.arange(2, 9)[None]
    bits = np.broadcast_to(np.arange(2, 9), (6, 7))
    found, rows = allocate(damage, bits, 46), np.arange(6)
    least = min(
        damage[rows, list(chosen)].sum()
        for chosen in itertools.product(range(4, 7), repeat=6)
        if bits[rows, list(chosen)].sum() <= 46
    )
    assert damage[rows, found].sum() == pytest.approx(least, rel=1e-9)
