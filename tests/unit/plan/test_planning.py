"""Planning against matrices solved by hand."""

from dataclasses import replace

import numpy as np
import pytest

from mka.errors import PlanError, RecipeError
from mka.evidence.needs import Evidence
from mka.evidence.states import LayerScores
from mka.methods import resolve_method
from mka.plan.deleting import delete_least_important
from mka.plan.grouping import join_layers, merge_adjacent
from mka.plan.plan import MergedLayer, Step
from mka.plan.target import Aim, Bound, fit_layers, resolve_target
from mka.recipe import MethodChoice


def adjacent(*values, far=0.0):
    """Symmetric matrix with the given similarities of neighbours, 1 on the diagonal and ``far`` elsewhere."""
    count = len(values) + 1
    matrix = np.full((count, count), far)
    np.fill_diagonal(matrix, 1.0)
    for i, value in enumerate(values):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    return matrix


def merge(similarity, layers_out, *, kinds=None, first=0, last=0, weight=0.5, rescore=None, on_merge=None):
    return merge_adjacent(
        similarity,
        layers_out,
        kinds=kinds or ["same"] * len(similarity),
        protect_first=first,
        protect_last=last,
        choose_weight=weight if callable(weight) else lambda layers, position, score: weight,
        rescore=rescore,
        on_merge=on_merge,
    )[:2]


def groups(layers):
    return [layer.sources for layer in layers]


def test_the_most_similar_neighbours_merge_first():
    layers, steps = merge(adjacent(0.2, 0.9, 0.4, 0.7), 3)
    assert groups(layers) == [(0,), (1, 2), (3, 4)]
    assert [(step.left, step.right, step.score) for step in steps] == [((1,), (2,), 0.9), ((3,), (4,), 0.7)]


def test_only_neighbours_merge_however_similar_others_are():
    layers, _ = merge(adjacent(0.2, 0.3, 0.1, far=0.99), 3)
    assert groups(layers) == [(0,), (1, 2), (3,)]


def test_ties_go_to_the_deeper_pair():
    layers, _ = merge(adjacent(0.5, 0.5, 0.1, 0.5, 0.1), 5)
    assert groups(layers) == [(0,), (1,), (2,), (3, 4), (5,)]
    layers, _ = merge(np.ones((5, 5)), 3)
    # 3-4 is deepest; then 2 with (3, 4) ties with everything before it and is deepest again.
    assert groups(layers) == [(0,), (1,), (2, 3, 4)]


def test_one_shot_represents_a_group_by_its_last_layer():
    # After (1, 2) the pair {(1, 2), 3} scores s[2, 3] = 0.3 and {0, (1, 2)} scores s[0, 2] = 0.6.
    similarity = adjacent(0.1, 0.9, 0.3)
    similarity[0, 2] = similarity[2, 0] = 0.6
    layers, steps = merge(similarity, 2)
    assert groups(layers) == [(0, 1, 2), (3,)]
    assert steps[1] == Step((0,), (1, 2), 0.6, 0.5)


def test_iterative_selection_follows_the_new_scores():
    similarity = adjacent(0.1, 0.9, 0.3, 0.5)
    assert groups(merge(similarity, 3)[0]) == [(0,), (1, 2), (3, 4)]
    seen = []

    def rescore(layers):
        seen.append(groups(layers))
        # Group by group: now the first pair is the closest.
        return adjacent(*[0.8 if i == 0 else 0.2 for i in range(len(layers) - 1)])

    layers, steps = merge(similarity, 2, rescore=rescore)
    assert groups(layers) == [(0, 1, 2, 3), (4,)]
    assert [step.score for step in steps] == [0.9, 0.8, 0.8]
    # Looked at again after every merge but the last, with the layers as they then were.
    assert seen == [[(0,), (1, 2), (3,), (4,)], [(0, 1, 2), (3,), (4,)]]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 0, [(0, 1), (2,), (3,), (4,), (5,)]),
        (1, 0, [(0,), (1,), (2,), (3,), (4, 5)]),
        (1, 1, [(0,), (1,), (2,), (3, 4), (5,)]),
        (2, 2, [(0,), (1,), (2, 3), (4,), (5,)]),
    ],
)
def test_protected_layers_take_no_part(first, last, expected):
    layers, _ = merge(adjacent(0.9, 0.1, 0.5, 0.7, 0.8), 5, first=first, last=last)
    assert groups(layers) == expected


def test_different_kinds_never_merge():
    kinds = ["local", "local", "global", "local", "local", "global"]
    layers, _ = merge(adjacent(0.1, 0.9, 0.9, 0.2, 0.9), 4, kinds=kinds)
    assert groups(layers) == [(0, 1), (2,), (3, 4), (5,)]
    with pytest.raises(PlanError, match="no mergeable pair is left at 4 layers"):
        merge(adjacent(0.1, 0.9, 0.9, 0.2, 0.9), 3, kinds=kinds)


def test_an_unreachable_target_says_what_stands_in_the_way():
    with pytest.raises(PlanError) as caught:
        merge(adjacent(*[0.5] * 5), 2, first=2, last=2)
    assert str(caught.value) == (
        "target of 2 layers cannot be reached: no mergeable pair is left at 5 layers with the first 2 and last 2 "
        "protected; protect fewer layers or aim higher"
    )
    layers, _ = merge(adjacent(*[0.5] * 5), 5, first=2, last=2)
    assert len(layers) == 5


def test_nothing_to_merge_merges_nothing():
    layers, steps = merge(adjacent(0.9, 0.9), 3)
    assert groups(layers) == [(0,), (1,), (2,)] and steps == () and all(layer.is_copy for layer in layers)
    layers, _ = merge(np.ones((1, 1)), 1)
    assert groups(layers) == [(0,)]


def test_progress_counts_merges():
    ticks = []
    merge(adjacent(0.1, 0.2, 0.3, 0.4), 2, on_merge=lambda: ticks.append(1))
    assert len(ticks) == 3


def test_weights_of_a_chain_multiply_out():
    # 0 and 1 first: 0.6, 0.4. Then that group against 2: 0.6 * (0.6, 0.4) and 0.4.
    layers, _ = merge(adjacent(0.9, 0.8, 0.1), 2, weight=0.6)
    assert groups(layers) == [(0, 1, 2), (3,)]
    np.testing.assert_allclose(layers[0].weights, [0.36, 0.24, 0.4], rtol=1e-15)


def test_a_chain_from_the_back_weighs_the_front_most():
    # What folding the last two layers again and again would do (science: 0.6225, 0.2350, 0.0887, 0.0335, ...).
    layers, _ = merge(np.full((14, 14), 0.5), 1, weight=0.6224593312018546)
    weights = layers[0].weights
    np.testing.assert_allclose(weights[:4], [0.6225, 0.2350, 0.0887, 0.0335], atol=5e-5)
    assert sum(weights) == pytest.approx(1.0, abs=1e-15)
    assert len(weights) == 14 and list(weights[:-1]) == sorted(weights[:-1], reverse=True)


def test_choose_weight_is_told_the_layers_so_far_the_place_and_the_score():
    calls = []

    def choose(layers, position, score):
        calls.append((groups(layers), position, score))
        return 1.0

    layers, _ = merge(adjacent(0.2, 0.9, 0.4), 2, weight=choose)
    assert calls == [([(0,), (1,), (2,), (3,)], 1, 0.9), ([(0,), (1, 2), (3,)], 1, 0.4)]
    assert layers[1] == MergedLayer((1, 2, 3), (1.0, 0.0, 0.0))


def test_join_is_a_convex_combination_of_groups():
    left, right = MergedLayer((1, 2), (0.5, 0.5)), MergedLayer((3, 4), (0.25, 0.75))
    assert join_layers(left, right, 0.0) == MergedLayer((1, 2, 3, 4), (0.0, 0.0, 0.25, 0.75))
    assert join_layers(left, right, 1.0) == MergedLayer((1, 2, 3, 4), (0.5, 0.5, 0.0, 0.0))
    np.testing.assert_allclose(join_layers(left, right, 0.2).weights, [0.1, 0.1, 0.2, 0.6])


def test_deletion_takes_the_least_important_and_ties_the_deeper():
    layers, steps, _ = delete_least_important(np.array([0.0, 0.3, 0.1, 0.1, 0.2, 0.0]), Aim(4, 1, 1))
    assert groups(layers) == [(0,), (1,), (4,), (5,)]
    assert steps == (Step((3,), (), 0.1, 0.0), Step((2,), (), 0.1, 0.0))


@pytest.mark.parametrize(("first", "last", "reached"), [(2, 2, 4), (3, 3, 6), (5, 5, 6)])
def test_deletion_refuses_what_protection_forbids(first, last, reached):
    with pytest.raises(PlanError, match=f"target of 3 layers cannot be reached: .* at {reached} layers"):
        delete_least_important(np.arange(6.0), Aim(3, first, last))


# Ten layers of 60 bytes in a checkpoint of 1,000 bytes: 6 % each.
TEN = {"layers_in": 10, "layer_bytes": [60] * 10, "total_bytes": 1000}


@pytest.mark.parametrize(
    ("target", "layers_out"),
    [
        ({"layers": 10}, 10),
        ({"layers": 1}, 1),
        ({"layer_ratio": 0.25}, 8),  # 7.5 rounds to the even 8
        ({"layer_ratio": 0.3}, 7),
        ({"layer_ratio": 0.34}, 7),  # 6.6
        ({"layer_ratio": 0.99}, 1),  # 0.1 would be no model
        ({"size_ratio": 0.06}, 9),  # exactly one layer
        ({"size_ratio": 0.061}, 8),  # a little more than one
        ({"size_ratio": 0.18}, 7),  # exactly three
        ({"size_ratio": 0.54}, 1),  # nine of ten
    ],
)
def test_targets_resolve_to_a_number_of_layers(target, layers_out):
    assert resolve_target(**TEN, **target) == layers_out


def test_rounding_errors_cost_no_layer():
    # One layer is exactly the 7 % asked for, but 0.07 * 100 is 7.000000000000001.
    assert resolve_target(10, [7] * 10, 100, size_ratio=0.07) == 9


def test_a_size_ratio_counts_the_average_layer():
    # 100 and 300 bytes: 200 on average, a fifth of 1,000.
    assert resolve_target(2, [100, 300], 1000, size_ratio=0.2) == 1


@pytest.mark.parametrize("layers", [0, -1, 11])
def test_a_target_below_one_or_above_the_layer_count_is_refused(layers):
    with pytest.raises(RecipeError, match=f"target of {layers} layers: the model has 10; allowed: 1 to 10"):
        resolve_target(**TEN, layers=layers)


def test_a_size_that_depth_cannot_reach_is_refused_with_what_it_can():
    with pytest.raises(RecipeError) as caught:
        resolve_target(**TEN, size_ratio=0.55)
    assert "the layers hold 60% of the bytes and one must remain; at most 0.540 can be reached" in str(caught.value)


def test_no_target_at_all_is_refused():
    with pytest.raises(RecipeError, match="one of layers, layer_ratio, size_ratio must be given"):
        resolve_target(**TEN)


# Of ten layers 60 MB each beside 400 MB, and a speed that falls with them.
SMALL = Bound("target.bytes", 700e6, lambda layers: 400e6 + 60e6 * layers, True)
FAST = Bound("target.decode_speed", 1.5, lambda layers: 12 / (layers + 2), False)


@pytest.mark.parametrize(
    ("bounds", "layers_out"), [([], 10), ([SMALL], 5), ([FAST], 6), ([FAST, SMALL], 5), ([SMALL, FAST], 5)]
)
def test_bounds_leave_the_most_layers_that_keep_all_of_them(bounds, layers_out):
    assert fit_layers(bounds, 10, 3) == layers_out


def test_layers_that_are_asked_for_have_to_keep_the_bounds():
    assert fit_layers([SMALL, FAST], 10, 3, layers=4) == 4
    with pytest.raises(RecipeError, match=r"target\.bytes 700 MB cannot be reached: with 6 layers it is 760 MB$"):
        fit_layers([SMALL, FAST], 10, 3, layers=6)
    with pytest.raises(RecipeError, match=r"target\.decode_speed 1\.5 cannot .*: with 7 layers it is 1\.333$"):
        fit_layers([FAST], 10, 3, layers=7)


def test_a_bound_that_nothing_keeps_is_refused_with_what_is_nearest():
    with pytest.raises(RecipeError) as caught:
        fit_layers([FAST, replace(SMALL, asked=500e6)], 10, 3)
    assert (
        "target.bytes 500 MB cannot be reached: with 3 layers, the fewest that protection leaves, it is 580 MB"
        in str(caught.value)
    )
    # What is told is allowed, though it is no round number.
    third = replace(SMALL, asked=1.0, reach=lambda layers: 1000 * layers / 3)
    with pytest.raises(RecipeError, match=r"1 B cannot be reached: .* it is 333\.334 B"):
        fit_layers([third], 1, 1)


def plan_with_mka(similarity, layers_out, *, divergence=None, **settings):
    scores = LayerScores("pairwise-similarity", similarity, "", "mka", {})
    evidence = Evidence(len(similarity), ["same"] * len(similarity), divergence=divergence)
    return resolve_method(MethodChoice(name="mka", settings=settings)).plan(evidence, scores, Aim(layers_out))


def test_similarity_is_the_share_of_the_earlier_layer():
    plan = plan_with_mka(adjacent(0.2, 0.75, 0.1), 3)
    assert plan.layers[1] == MergedLayer((1, 2), (0.75, 0.25))
    plan = plan_with_mka(adjacent(0.75, 0.6, 0.1), 2, weights="similarity")
    assert plan.layers[0].sources == (0, 1, 2)
    np.testing.assert_allclose(plan.layers[0].weights, [0.6 * 0.75, 0.6 * 0.25, 0.4])


def test_a_fixed_weight_is_used_for_every_pair():
    plan = plan_with_mka(adjacent(0.9, 0.8), 1, weights="fixed", weight=0.6)
    np.testing.assert_allclose(plan.layers[0].weights, [0.36, 0.24, 0.4])


def test_a_similarity_outside_zero_to_one_is_clipped_to_a_weight():
    assert plan_with_mka(adjacent(1.2), 1).layers[0].weights == (1.0, 0.0)
    assert plan_with_mka(adjacent(-0.2), 1).layers[0].weights == (0.0, 1.0)


@pytest.mark.parametrize(("best", "found"), [(0.0, 0.0), (0.3, 0.25), (0.9, 1.0), (1.0, 1.0), (0.55, 0.5)])
def test_line_search_takes_the_weight_of_least_divergence(best, found):
    tried = []

    def divergence(layers):
        tried.append(layers)
        return abs(layers[1].weights[0] - best)

    plan = plan_with_mka(adjacent(0.1, 0.9, 0.2), 3, divergence=divergence, weights="line-search")
    assert plan.layers[1] == MergedLayer((1, 2), (found, 1 - found))
    assert plan.steps[0].weight == found
    # Both deletions were tried, in the model as it then was.
    assert {layers[1].weights[0] for layers in tried} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all(groups(layers) == [(0,), (1, 2), (3,)] for layers in tried)


def test_line_search_sees_earlier_merges():
    seen = []

    def divergence(layers):
        seen.append(groups(layers))
        return layers[-1].weights[0]

    similarity = adjacent(0.1, 0.2, 0.9, far=0.5)
    plan = plan_with_mka(similarity, 2, divergence=divergence, weights="line-search", grid=[0, 1])
    assert groups(plan.layers) == [(0,), (1, 2, 3)]
    assert seen == [[(0,), (1,), (2, 3)]] * 2 + [[(0,), (1, 2, 3)]] * 2


def test_scores_of_another_model_are_refused():
    scores = LayerScores("pairwise-similarity", adjacent(0.5), "", "mka", {})
    with pytest.raises(PlanError, match="scores are of 2 layers, the model has 3"):
        resolve_method(MethodChoice(name="mka")).plan(Evidence(3, "aaa"), scores, Aim(2))
