"""Policy-gradient masks against closed forms, exact enumeration and planted layers."""

from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import minimize
from support.evidence import neutralise, score_and_plan
from support.models import LAYERS, make_texts, make_tiny_model

from mka.errors import PlanError
from mka.evidence.needs import Evidence
from mka.evidence.states import LayerScores
from mka.methods import resolve_method
from mka.methods.policy_gradient import SPREAD, Settings, begin, descend, estimate_gradient, project
from mka.plan.plan import MergePlan, keep_layers
from mka.plan.target import Aim
from mka.recipe import MethodChoice

# Projection onto 0 <= s <= 1, sum(s) = total


@pytest.mark.parametrize(
    ("point", "total", "expected"),
    [
        ([0.2, 0.3, 0.5], 1.0, [0.2, 0.3, 0.5]),  # it lies there
        ([0.5, 0.7, 0.9], 1.5, [0.3, 0.5, 0.7]),  # 0.6 too much, a third of it each
        ([2.0, 0.5, 0.4], 1.5, [1.0, 0.3, 0.2]),  # the first is held at 1, the others give 0.2 each
        ([-1.0, 0.5, 0.4], 1.5, [0.0, 0.8, 0.7]),  # the first is held at 0, the others take 0.3 each
        ([5.0, 0.0, -5.0], 1.25, [1.0, 0.25, 0.0]),
        ([0.1, 0.9], 0.0, [0.0, 0.0]),
        ([0.1, 0.9], 2.0, [1.0, 1.0]),
        ([3.0, 1.0, 1.0], 1.0, [1.0, 0.0, 0.0]),  # any v from 1 to 2 gives the sum
    ],
)
def test_a_projection_solved_by_hand(point, total, expected):
    assert_allclose(project(np.array(point), total), expected, atol=1e-12)


def test_nothing_allowed_is_nearer_than_the_projection():
    random = np.random.default_rng(0)
    for count in (2, 5, 9):
        point, total = random.normal(0.5, 1.0, count), float(random.uniform(0, count))
        found = project(point, total)
        assert found.min() >= 0 and found.max() <= 1 and found.sum() == pytest.approx(total, abs=1e-12)
        solved = minimize(
            lambda s, point=point: ((s - point) ** 2).sum(),
            np.full(count, total / count),
            jac=lambda s, point=point: 2 * (s - point),
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda s, total=total: s.sum() - total},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert solved.success
        assert_allclose(found, solved.x, atol=1e-6)


# The score-function gradient


def enumerate_masks(keep):
    """Every mask, (2^n, n), with its probability, (2^n,)."""
    masks = np.array(list(product([0, 1], repeat=len(keep))))
    return masks, np.where(masks == 1, keep, 1 - keep).prod(axis=1)


def crooked(masks):
    """A loss with interactions of layers."""
    return 3 - 2 * masks[..., 0] + masks[..., 1] * masks[..., 2] - 4 * masks[..., 0] * masks[..., 1] * masks[..., 2]


@pytest.mark.parametrize("baseline", [0.0, 2.5, -7.0])
def test_the_estimate_is_unbiased_whatever_the_baseline(baseline):
    keep = np.array([0.7, 0.2, 0.95])
    masks, probabilities = enumerate_masks(keep)
    one = [estimate_gradient(mask[None], crooked(mask[None]), baseline, keep) for mask in masks]
    # E[L] = 3 - 2 a + b c - 4 a b c for independent draws with probabilities a, b, c.
    a, b, c = keep
    assert_allclose(probabilities @ np.array(one), [-2 - 4 * b * c, c - 4 * a * c, b - 4 * a * b], rtol=1e-12)


def test_an_estimate_from_several_draws_is_the_mean_of_theirs():
    keep = np.array([0.5, 0.25])
    masks, losses = np.array([[1, 0], [0, 1]]), np.array([3.0, 5.0])
    # (m - s) / (s (1 - s)): 2 and -4/3 for the first draw, -2 and 4 for the second; off the baseline: -1 and 1.
    assert_allclose(estimate_gradient(masks, losses, 4.0, keep), [-2.0, (4 / 3 + 4) / 2], rtol=1e-12)


def test_certain_layers_have_no_gradient():
    found = estimate_gradient(np.array([[1, 0, 1]]), np.array([2.0]), 1.0, np.array([1.0, 0.0, 0.5]))
    assert_allclose(found, [0.0, 0.0, 2.0])


# Rounds


def test_the_first_round_starts_the_baseline_and_the_next_moves():
    settings = Settings(samples=2, step=0.1, momentum=0.5, seed=3)
    seen = []

    def measure(mask):
        seen.append(mask.astype(float))
        return float(len(seen))

    start = np.array([0.5, 0.5, 0.5, 0.5])
    assert np.array_equal(descend(measure, start, 1, settings), start)
    seen.clear()
    found = descend(measure, start, 3, settings)
    # Losses 1 and 2, 3 and 4, 5 and 6; baseline 1.5, then half of it and half of 3.5.
    keep = start
    for first, baseline in ((2, 1.5), (4, 2.5)):
        gradient = np.zeros(4)
        for draw in (0, 1):
            mask, loss = seen[first + draw], first + draw + 1
            gradient += (loss - baseline) * np.where(mask == 1, 1 / keep, -1 / (1 - keep)) / 2
        keep = project(keep - 0.1 * gradient, 2.0)
    assert_allclose(found, keep, atol=1e-12)


def test_layers_that_matter_come_to_stay():
    weights = np.array([0.1, 2.0, 0.1, 1.5, 0.2, 1.0])
    settings = Settings(samples=4, step=0.03)
    found = descend(lambda mask: float(weights @ ~mask), np.full(6, 0.5), 200, settings)
    assert found.sum() == pytest.approx(3.0)
    assert set(np.argsort(found)[3:]) == {1, 3, 5}


def test_a_mask_that_keeps_nothing_is_not_measured():
    counts = []
    descend(lambda mask: counts.append(mask.sum()) or 1.0, np.full(4, 0.25), 50, Settings())
    assert len(counts) == 200 and min(counts) >= 1


# The start


def test_probabilities_begin_equal_or_in_the_order_of_influence():
    assert_allclose(begin(None, 4, 3), [0.75] * 4)
    # Ranks 1, 2, 0 (the deeper of two equals goes first), spread evenly around one half.
    ordered = begin(np.array([0.1, 9.0, 0.1]), 3, 2)
    assert_allclose(ordered, project(2 / 3 + SPREAD * np.array([0.0, 0.5, -0.5]), 2), atol=1e-12)
    assert ordered[2] < ordered[0] < ordered[1]
    assert_allclose(begin(np.array([3.0]), 1, 1), [1.0])


# The method


class Recorded:
    """A measure of 10 tokens that counts what it is asked."""

    tokens = 10

    def __init__(self, gain):
        self.gain, self.asked = gain, []

    def __call__(self, layers):
        kept = [layer.sources[0] for layer in layers]
        self.asked.append(kept)
        return -sum(self.gain[i] for i in kept)


def plan_with(aim, *, count=6, loss=None, divergence=None, influence=None, **settings):
    planner = resolve_method(MethodChoice(name="policy_gradient", settings=settings))
    values = np.arange(count, dtype=float) if influence is None else influence
    scores = LayerScores("layer-importance", values, "", "policy_gradient", {})
    return planner.plan(Evidence(count, "a" * count, loss=loss, divergence=divergence), scores, aim)


def test_the_least_probable_layers_go_and_protected_ones_are_always_there():
    gain = [0.0, 2.0, 0.1, 1.5, 0.2, 0.0]
    loss = Recorded(gain)
    plan = plan_with(Aim(4, 1, 1), loss=loss, budget=8000, start="uniform")
    assert plan.removed == (2, 4) and plan.layers == keep_layers([0, 1, 3, 5])
    assert all({0, 5} <= set(kept) for kept in loss.asked)
    assert [step.left[0] in (2, 4) and 0 <= step.score < 1 for step in plan.steps] == [True, True]
    # The order of influence says the opposite, and is overruled.
    assert plan_with(Aim(4, 1, 1), loss=Recorded(gain), budget=8000, influence=-np.array(gain)).removed == (2, 4)


@pytest.mark.parametrize("objective", ["loss", "divergence"])
def test_the_budget_is_kept_and_told(objective):
    measured = Recorded([1.0] * 6)
    plan = plan_with(Aim(4), budget=1234, samples=5, objective=objective, **{objective: measured})
    # 123 models of 10 tokens, less the base's own pass: 24 rounds of 5.
    assert len(measured.asked) == 120
    assert plan.search["spent"] == 10 * (120 + (objective == "divergence")) <= 1234
    assert MergePlan.from_json(plan.to_json()).search == plan.search


@pytest.mark.parametrize(("objective", "least"), [("loss", 100), ("divergence", 110)])
def test_too_small_a_budget_says_what_is_needed(objective, least):
    options = {"samples": 5, "objective": objective, objective: Recorded([1.0] * 6)}
    with pytest.raises(PlanError, match=f"budget of {least - 1} forward tokens is too small: .* need {least};"):
        plan_with(Aim(4), budget=least - 1, **options)
    assert plan_with(Aim(4), budget=least, **options).search["spent"] == least


def test_where_protection_leaves_no_choice_nothing_is_run():
    loss = Recorded([1.0] * 6)
    plan = plan_with(Aim(3, 2, 1), loss=loss)
    assert plan.removed == (2, 3, 4) and loss.asked == [] and plan.search["spent"] == 0
    assert plan_with(Aim(6), loss=loss, budget=1).is_identity


def test_a_seed_decides():
    plans = [plan_with(Aim(3), loss=Recorded([1.0] * 6), budget=400, seed=seed) for seed in (0, 0, *range(1, 8))]
    assert plans[0] == plans[1]
    assert len({plan.removed for plan in plans}) > 1


def test_a_layer_that_does_nothing_is_found():
    model = neutralise(make_tiny_model("llama", seed=5), 3)
    settings = {"budget": 40_000, "start": "uniform", "objective": "divergence"}
    _, plan = score_and_plan(model, "policy_gradient", settings, Aim(LAYERS - 1, 1, 1), make_texts(40, seed=1))
    assert plan.removed == (3,)
