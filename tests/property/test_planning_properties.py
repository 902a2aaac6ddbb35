"""What planning must do with any scores: reach the target, keep order and protection, stay a convex combination."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mka.errors import PlanError, RecipeError
from mka.evidence.needs import Evidence
from mka.evidence.states import LayerScores
from mka.methods import resolve_method
from mka.plan.deleting import delete_least_important
from mka.plan.grouping import merge_adjacent
from mka.plan.plan import MergePlan
from mka.plan.target import Aim, resolve_target
from mka.recipe import MethodChoice


@st.composite
def problems(draw, kinds=("same",)):
    """Symmetric similarities (few distinct values, so that ties happen), kinds, protection and a target."""
    count = draw(st.integers(1, 9))
    values = draw(st.lists(st.integers(0, 4), min_size=count * count, max_size=count * count))
    half = np.array(values, dtype=float).reshape(count, count) / 4
    similarity = np.maximum(half, half.T)
    np.fill_diagonal(similarity, 1.0)
    return {
        "similarity": similarity,
        "kinds": [draw(st.sampled_from(kinds)) for _ in range(count)],
        "protect_first": draw(st.integers(0, 3)),
        "protect_last": draw(st.integers(0, 3)),
        "layers_out": draw(st.integers(1, count)),
    }


def reachable(problem):
    """Fewest layers left when every run of free layers of one kind becomes one."""
    count = len(problem["similarity"])
    free = range(problem["protect_first"], count - problem["protect_last"])
    joins = sum(i in free and i + 1 in free and problem["kinds"][i] == problem["kinds"][i + 1] for i in range(count))
    return count - joins


def merged(problem, weight=0.5, rescore=None):
    return merge_adjacent(**problem, choose_weight=lambda *_: weight, rescore=rescore)[:2]


@given(problem=problems("ab"), weight=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_target_is_reached_exactly_when_kinds_and_protection_allow(problem, weight):
    count = len(problem["similarity"])
    if problem["layers_out"] < reachable(problem):
        with pytest.raises(PlanError, match=f"no mergeable pair is left at {reachable(problem)} layers"):
            merged(problem, weight)
        return
    layers, steps = merged(problem, weight)
    MergePlan("test", "", count, layers, steps)  # its own invariants
    assert len(layers) == problem["layers_out"] and len(steps) == count - len(layers)
    assert [i for layer in layers for i in layer.sources] == list(range(count))
    for layer in layers:
        assert len({problem["kinds"][i] for i in layer.sources}) == 1
        assert sum(layer.weights) == pytest.approx(1.0, abs=1e-12)
        assert all(0.0 <= w <= 1.0 for w in layer.weights)
        if min(layer.sources) < problem["protect_first"] or max(layer.sources) >= count - problem["protect_last"]:
            assert layer.is_copy


@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_each_step_takes_a_pair_that_no_other_surpasses(problem):
    assume(problem["layers_out"] >= reachable(problem))
    similarity = problem["similarity"]
    count = len(similarity)
    _, steps = merged(problem)
    current = [(i,) for i in range(count)]
    for step in steps:
        free = [
            (a, b)
            for a, b in pairwise(current)
            if a[0] >= problem["protect_first"] and b[-1] < count - problem["protect_last"]
        ]
        scores = [similarity[a[-1], b[-1]] for a, b in free]
        chosen = free.index((step.left, step.right))
        assert scores[chosen] == step.score == max(scores)
        assert step.score not in scores[chosen + 1 :]
        place = current.index(step.left)
        current[place : place + 2] = [step.left + step.right]


@given(problem=problems(), raised=st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_a_stricter_target_continues_a_looser_one(problem, raised):
    assume(problem["layers_out"] >= reachable(problem))
    _, steps = merged(problem)
    looser = {**problem, "layers_out": min(len(problem["similarity"]), problem["layers_out"] + raised)}
    _, fewer = merged(looser)
    assert steps[: len(fewer)] == fewer


@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_iterative_with_unchanged_scores_is_one_shot(problem):
    assume(problem["layers_out"] >= reachable(problem))

    def unchanged(layers):
        ends = [layer.sources[-1] for layer in layers]
        return problem["similarity"][np.ix_(ends, ends)]

    assert merged(problem, rescore=unchanged) == merged(problem)


@given(
    importance=st.lists(st.integers(0, 4), min_size=1, max_size=9),
    first=st.integers(0, 3),
    last=st.integers(0, 3),
    out=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_deletion_keeps_the_most_important_free_layers(importance, first, last, out):
    count = len(importance)
    assume(out <= count)
    free = [i for i in range(count) if first <= i < count - last]
    values = np.array(importance, dtype=float)
    if count - out > len(free):
        with pytest.raises(PlanError, match=f"at {count - len(free)} layers"):
            delete_least_important(values, Aim(out, first, last))
        return
    layers, steps, _ = delete_least_important(values, Aim(out, first, last))
    kept = [layer.sources[0] for layer in layers]
    gone = [step.left[0] for step in steps]
    assert all(layer.is_copy for layer in layers) and len(kept) == out
    assert sorted(kept + gone) == list(range(count)) and set(gone) <= set(free)
    for i in gone:
        for j in set(kept) & set(free):
            assert importance[i] < importance[j] or (importance[i] == importance[j] and i > j)


@given(
    values=st.lists(st.floats(0, 10), min_size=5, max_size=60),
    grid=st.lists(st.sampled_from([0.125, 0.3, 0.5, 0.8]), max_size=4),
    out=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_line_search_is_never_worse_than_either_deletion(values, grid, out):
    """The divergence is arbitrary: any number for any candidate, the same for the same candidate."""
    known = {}

    def divergence(layers):
        return known.setdefault(tuple(layers), values[len(known) % len(values)])

    count = 5
    scores = LayerScores("pairwise-similarity", np.full((count, count), 0.5), "", "mka", {})
    searching = {"weights": "line-search", "grid": [*grid, 0.0, 1.0]}
    planner = resolve_method(MethodChoice(name="mka", settings=searching))
    plan = planner.plan(Evidence(count, "a" * count, divergence=divergence), scores, Aim(out))
    groups = [(i,) for i in range(count)]
    for step in plan.steps:
        place = groups.index(step.left)
        groups[place : place + 2] = [step.left + step.right]
        tried = {layers[place].weights: d for layers, d in known.items() if [x.sources for x in layers] == groups}
        # Of those tried here, the chosen share of the left group has the least; 0 and 1 were among them.
        share = {round(sum(w[: len(step.left)]), 12): d for w, d in tried.items()}
        assert share[round(step.weight, 12)] <= min(share[0.0], share[1.0])


@given(
    layer_bytes=st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    rest=st.integers(0, 20_000),
    ratio=st.floats(0.001, 0.999),
)
@settings(max_examples=200, deadline=None)
def test_a_size_ratio_is_met_with_as_many_layers_as_possible(layer_bytes, rest, ratio):
    count, total = len(layer_bytes), sum(layer_bytes) + rest
    average = sum(layer_bytes) / count
    try:
        out = resolve_target(count, layer_bytes, total, size_ratio=ratio)
    except RecipeError:
        assert (count - 1) * average / total < ratio
        return
    assert 1 <= out <= count
    assert (count - out) * average / total >= ratio * (1 - 1e-8)
    assert out == count or (count - out - 1) * average / total < ratio


@given(count=st.integers(1, 200), ratio=st.floats(0.001, 0.999))
@settings(max_examples=200, deadline=None)
def test_a_layer_ratio_lands_on_the_nearest_layer(count, ratio):
    out = resolve_target(count, [1] * count, count, layer_ratio=ratio)
    assert 1 <= out <= count
    assert abs(out - count * (1 - ratio)) <= 0.5 + 1e-9 or out == 1
