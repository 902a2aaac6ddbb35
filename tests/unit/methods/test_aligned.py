"""Choosing groups for aligned merging: partitions against brute force, plans against tables written by hand."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mka.errors import PlanError
from mka.evidence.needs import HIDDEN_STATES, TRIALS, Evidence
from mka.evidence.states import LayerScores
from mka.methods import get_method, method_settings, resolve_method
from mka.methods.aligned import _propose
from mka.plan.grouping import partition_layers
from mka.plan.plan import MergedLayer, identity_layers
from mka.plan.target import Aim
from mka.recipe import MethodChoice

# partition_layers


def all_partitions(count, groups):
    """Every way to cut ``count`` layers into ``groups`` of neighbours."""
    for cuts in combinations(range(1, count), groups - 1):
        edges = [0, *cuts, count]
        yield [(a, b - 1) for a, b in pairwise(edges)]


def total(spans, costs):
    """Summed cost; infinite if a group of several layers is not allowed."""
    return sum(costs.get(span, math.inf) if span[0] < span[1] else 0.0 for span in spans)


@st.composite
def problems(draw):
    count = draw(st.integers(1, 8))
    spans = list(combinations(range(count), 2))
    # Whole numbers, negative ones too: a merge may measure better than its base by chance.
    costs = draw(st.dictionaries(st.sampled_from(spans), st.integers(-3, 30)) if spans else st.just({}))
    return count, draw(st.integers(1, count)), {span: float(cost) for span, cost in costs.items()}


@settings(max_examples=200, deadline=None)
@given(problems())
def test_no_partition_costs_less(problem):
    count, groups, costs = problem
    least = min(total(spans, costs) for spans in all_partitions(count, groups))
    if math.isinf(least):
        with pytest.raises(PlanError, match="cannot be reached"):
            partition_layers(costs, count, groups)
        return
    found = partition_layers(costs, count, groups)
    assert found in list(all_partitions(count, groups))
    assert total(found, costs) == least


def test_a_nested_case_by_hand():
    """The cheapest pair is no part of the cheapest way to take three layers out."""
    costs = {(1, 2): 1.0, (2, 3): 4.0, (0, 1): 4.0, (3, 4): 9.0, (0, 2): 7.0, (1, 3): 8.0, (0, 3): 8.5}
    assert partition_layers(costs, 5, 5) == [(i, i) for i in range(5)]
    assert partition_layers(costs, 5, 4) == [(0, 0), (1, 2), (3, 3), (4, 4)]  # 1
    assert partition_layers(costs, 5, 3) == [(0, 2), (3, 3), (4, 4)]  # 7, against 4 + 4, 8 and 1 + 9
    assert partition_layers(costs, 5, 2) == [(0, 3), (4, 4)]  # 8.5, against 7 + 9 and 4 + 4 + nothing
    with pytest.raises(PlanError, match="target of 1 layers cannot be reached with the 7 groups allowed"):
        partition_layers(costs, 5, 1)


# The method


class Tables:
    """Trials read from tables; what was asked for is kept."""

    def __init__(self, missed, costs):
        self.missed, self.costs = missed, costs
        self.attentions, self.groups = [], []

    def measure_attention(self, layer):
        self.attentions.append(layer)
        return self.missed[layer]

    def measure_mlp(self, layer):
        return -self.missed[layer]  # the MLP missed most is of the layer whose attention is missed least

    def measure_group(self, layer):
        self.groups.append(layer)
        return self.costs[layer.sources]


LAYERS = 6
MISSED = [0.9, 0.1, 0.5, 0.2, 0.4, 0.3]
SPANS = [(a, a + n - 1) for n in (2, 3, 4) for a in range(LAYERS - n + 1)]


def tables(**special):
    """Groups cost their number of layers, but for those given as ``_first_last=cost``."""
    costs = {tuple(range(a, b + 1)): float(b - a + 1) for a, b in SPANS}
    for name, cost in special.items():
        a, b = map(int, name[1:].split("_"))
        costs[tuple(range(a, b + 1))] = cost
    return Tables(MISSED, costs)


def choose(trials, layers_out, *, similarity=None, kinds=None, first=0, last=0, on_progress=None, **given):
    planner = resolve_method(MethodChoice(name="aligned", settings=given))
    values = np.eye(LAYERS) if similarity is None else similarity
    scores = LayerScores("pairwise-similarity", values, "", "aligned", {})
    evidence = Evidence(LAYERS, kinds or [None] * LAYERS, trials=trials, on_progress=on_progress)
    return planner.plan(evidence, scores, Aim(layers_out, first, last))


def groups(plan):
    return [layer.sources for layer in plan.layers]


def test_the_cheapest_partition_is_planned_and_the_attention_missed_most_survives():
    trials = tables(_1_2=0.25, _3_5=0.5)
    plan = choose(trials, 3, selection="divergence")
    assert groups(plan) == [(0,), (1, 2), (3, 4, 5)]
    assert plan.layers[0] == MergedLayer((0,), (1.0,))
    # Layer 2 is missed more than layer 1, layer 4 more than 3 and 5; the neurons of all compete.
    assert [layer.attention for layer in plan.layers[1:]] == [(2,), (4,)]
    assert [layer.mlp for layer in plan.layers[1:]] == [(1, 2), (3, 4, 5)]
    assert [(step.left, step.right, step.score) for step in plan.steps] == [((1,), (2,), 0.25), ((3,), (4, 5), 0.5)]
    assert {group.sources for group in trials.groups} == {tuple(range(a, b + 1)) for a, b in SPANS}
    assert len(trials.groups) == len(SPANS)


def test_of_each_half_the_one_missed_most_survives():
    plan = choose(tables(_1_2=0.25, _3_5=0.5), 3, selection="divergence", operator="keep")
    assert [(layer.attention, layer.mlp) for layer in plan.layers[1:]] == [((2,), (1,)), ((4,), (3,))]
    assert not any(layer.selects for layer in plan.layers)


def test_a_group_is_tried_with_the_attention_it_will_have():
    for operator in ("keep", "concat-select"):
        trials = tables()
        choose(trials, 4, selection="divergence", operator=operator)
        for group in trials.groups:
            assert group.attention == (max(group.sources, key=MISSED.__getitem__),)


def test_groups_are_no_larger_than_allowed_and_leave_protected_layers_alone():
    trials = tables(_0_1=-9.0, _4_5=-9.0)
    plan = choose(trials, 4, selection="divergence", largest=2, first=1, last=1)
    tried = {group.sources for group in trials.groups}
    assert tried == {(1, 2), (2, 3), (3, 4)} and set(trials.attentions) == {1, 2, 3, 4}
    assert groups(plan) == [(0,), (1, 2), (3, 4), (5,)]
    with pytest.raises(PlanError, match="target of 3 layers cannot be reached"):
        choose(tables(), 3, selection="divergence", largest=2, first=1, last=1)


def test_a_target_out_of_reach_is_refused_before_anything_is_tried():
    trials = tables()
    with pytest.raises(PlanError, match="cannot be reached"):
        choose(trials, 1, selection="divergence", first=2, last=1)
    with pytest.raises(PlanError, match="cannot be reached"):
        choose(trials, 2, selection="divergence", largest=2)
    assert trials.groups == trials.attentions == []


def test_layers_of_different_kinds_are_averaged_never_but_their_neurons_may_meet():
    kinds = ["a", "a", "b", "b", "a", "a"]
    trials = tables(_1_2=-5.0)
    plan = choose(trials, 4, selection="divergence", operator="average", kinds=kinds)
    assert {group.sources for group in trials.groups} == {(0, 1), (2, 3), (4, 5)}
    assert all(len({kinds[i] for i in layer.sources}) == 1 for layer in plan.layers)
    assert {layer.weights for layer in plan.layers if len(layer.sources) == 2} == {(0.5, 0.5)}
    with pytest.raises(PlanError, match="cannot be reached"):
        choose(tables(), 2, selection="divergence", operator="average", kinds=kinds)
    mixed = choose(tables(_1_2=-5.0), 5, selection="divergence", kinds=kinds)
    assert groups(mixed)[1] == (1, 2)


def test_weights_of_an_average_are_those_of_its_number_of_layers():
    plan = choose(tables(_1_3=-5.0), 4, selection="divergence", operator="average")
    assert plan.layers[1].weights == pytest.approx((1 / 3,) * 3)


def near(*values):
    """Similarities of neighbours by hand, those of layers further apart their product."""
    matrix = np.eye(LAYERS)
    for a in range(LAYERS):
        for b in range(a + 1, LAYERS):
            matrix[a, b] = matrix[b, a] = math.prod(values[a:b])
    return matrix


SIMILAR = near(0.5, 0.9, 0.6, 0.8, 0.7)


def test_similarity_alone_merges_the_most_alike_and_tries_nothing():
    plan = choose(None, 3, selection="similarity", similarity=SIMILAR)
    # 1-2 (0.9), then 3-4 (0.8), then 4-5 (0.7); the first layer's attention, for nothing says which is missed.
    assert groups(plan) == [(0,), (1, 2), (3, 4, 5)]
    assert [layer.attention for layer in plan.layers[1:]] == [(1,), (3,)]
    assert [step.left for step in plan.steps] == [(1,), (3,)]  # most alike first
    method = get_method("aligned")
    assert method.needs(method_settings("aligned", {"selection": "similarity"})) == {HIDDEN_STATES}
    for selection in ("divergence", "both"):
        assert method.needs(method_settings("aligned", {"selection": selection})) == {HIDDEN_STATES, TRIALS}


def test_averages_by_similarity_keep_to_their_kind():
    kinds = ["a", "a", "b", "b", "b", "b"]
    plan = choose(None, 5, selection="similarity", operator="average", similarity=SIMILAR, kinds=kinds)
    assert groups(plan) == [(0,), (1,), (2,), (3, 4), (5,)]
    free = choose(None, 5, selection="similarity", similarity=SIMILAR, kinds=kinds)
    assert groups(free) == [(0,), (1, 2), (3,), (4,), (5,)]


@pytest.mark.parametrize(
    ("share", "pairs", "triples"),
    [
        # Pairs by similarity: 1-2 (.9), 3-4 (.8), 4-5 (.7), 2-3 (.6), 0-1 (.5).
        # Triples: 3-5 (.56), 1-3 (.54), 2-4 (.48), 0-2 (.45).
        (1.0, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [(0, 2), (1, 3), (2, 4), (3, 5)]),
        (0.6, [(1, 2), (3, 4), (4, 5)], [(1, 3), (3, 5)]),
        (0.01, [(1, 2)], [(3, 5)]),  # at least one of each size
    ],
)
def test_similarity_proposes_a_share_of_every_size(share, pairs, triples):
    spans = [span for span in SPANS if span[1] - span[0] < 3]
    assert _propose(spans, SIMILAR, share) == pairs + triples
    trials = tables()
    choose(trials, 5, selection="both", similarity=SIMILAR, proposed=share, largest=3)
    assert [(group.sources[0], group.sources[-1]) for group in trials.groups] == pairs + triples


def test_divergence_decides_among_what_similarity_proposes():
    cheap = tables(_0_1=-9.0, _4_5=0.1)
    assert groups(choose(cheap, 5, selection="both", similarity=SIMILAR, proposed=0.6))[4] == (4, 5)
    assert groups(choose(cheap, 5, selection="divergence"))[0] == (0, 1)


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        ({"selection": "divergence"}, len(SPANS)),
        ({"selection": "divergence", "first": 1, "last": 1}, 6),  # pairs, triples and the four of layers 1 to 4
        ({"selection": "both", "proposed": 0.6}, 3 + 2 + 2),
    ],
)
def test_progress_is_foretold_and_counts_every_group_tried(chosen, count):
    seen, trials = [], tables()
    choose(trials, 4, on_progress=seen.append, **chosen)
    given = {name: value for name, value in chosen.items() if name not in ("first", "last")}
    aim = Aim(4, chosen.get("first", 0), chosen.get("last", 0))
    assert get_method("aligned").units(LAYERS, aim, method_settings("aligned", given)) == (count, "group")
    assert sum(seen) == len(trials.groups) == count


def test_as_many_layers_as_there_are_is_the_identity():
    plan = choose(tables(), LAYERS, selection="divergence")
    assert plan.is_identity and plan.steps == () and plan.layers == identity_layers(LAYERS)


def test_scores_of_another_model_are_refused():
    with pytest.raises(PlanError, match="scores are of 4 layers, the model has 6"):
        choose(tables(), 4, similarity=np.eye(4))
