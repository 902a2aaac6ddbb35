"""Bits shared out over linear layers: the least damage that a budget buys, exactly. Pure."""

import numpy as np

from mka.errors import RecipeError

# Share of a budget that sums of floats may be off by.
TOLERANCE = 1e-9


def allocate(damage: np.ndarray, bits: np.ndarray, budget: float) -> np.ndarray:
    """Choose one option for each unit so that the damage adds up to the least the budget allows, (U,) int64.

    A multiple-choice knapsack, solved as an integer program.

    Args:
        damage: of each unit under each option, (U, K).
        bits: that it takes, (U, K).
        budget: most bits in all.

    Raises:
        RecipeError: if even the smallest options take more.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    units, options = damage.shape
    damage, budget = damage.clip(min=0.0), budget * (1 + TOLERANCE)  # what costs nothing may be measured below it
    if bits.min(axis=1).sum() > budget:
        raise RecipeError(f"a budget of {budget:.0f} bits: the smallest rounding takes {bits.min(axis=1).sum():.0f}")
    # Of every unit one, and of all no more bits than there are; scaled to where the solver's tolerances are small.
    one_each = csr_array(np.kron(np.eye(units), np.ones((1, options))))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(bits.ravel()[None] / budget, -np.inf, 1.0)]
    chosen, scale = np.zeros(units, dtype=np.int64), float(damage.max())
    # The solver's tolerance is absolute: once more in the scale of what was found.
    for _ in range(2):
        if scale <= 0.0:
            break
        solved = milp(
            damage.ravel() / scale,
            integrality=np.ones(damage.size),
            bounds=Bounds(0, 1),
            constraints=limits,
            options={"mip_rel_gap": 0.0},
        )
        chosen = solved.x.reshape(units, options).argmax(axis=1)
        scale = float(damage[np.arange(units), chosen].sum())
    return chosen if scale > 0.0 else _take_cheapest(damage, bits)


def sum_damage(damage: np.ndarray, chosen: np.ndarray) -> float:
    """Return what the options that were chosen lose together, of (U, K) damages and (U,) options."""
    return float(damage[np.arange(len(chosen)), chosen].clip(min=0.0).sum())


def _take_cheapest(damage: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Of the options that cost nothing, the smallest of each unit."""
    found: np.ndarray = np.where(damage <= 0.0, bits, np.inf).argmin(axis=1)
    return found
