"""Whole configurations: what is listed by hand, and what no chain of changes may break."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mka.errors import PlanError
from mka.plan.configurations import MUTATIONS, Space, draw_unseen, list_changes, mutate_unseen
from mka.plan.plan import MergedLayer, MergePlan, Step, keep_layers
from mka.plan.target import Aim


def deleted(space, layers):
    return tuple(space.find_deleted(layers))


def check(space, layers):
    """What every configuration of a space is."""
    plan = MergePlan("test", "", space.layers, layers)  # refuses layers that are no plan
    assert plan.layers_out == space.aim.layers_out
    copies = {layer.leader for layer in layers if layer.is_copy}
    protected = {*range(space.aim.protect_first), *range(space.layers - space.aim.protect_last, space.layers)}
    assert protected <= copies
    for layer in layers:
        first, last = layer.sources[0], layer.sources[-1]
        assert layer.sources == tuple(range(first, last + 1)) and len(layer.sources) <= max(space.largest, 1)
        assert not layer.selects
        if layer.weights:
            assert len({space.kinds[source] for source in layer.used}) == 1
            assert all(0 < weight <= 1 for weight in layer.weights)
        if len(layer.sources) == 1:
            assert layer.is_copy


@st.composite
def spaces(draw):
    count = draw(st.integers(2, 9))
    first = draw(st.integers(0, count - 1))
    last = draw(st.integers(0, count - 1 - first))
    kinds = draw(st.lists(st.sampled_from("ab"), min_size=count, max_size=count))
    out = draw(st.integers(max(1, first + last), count))
    return Space(kinds, Aim(out, first, last), draw(st.integers(1, 4)))


@given(space=spaces(), seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_whatever_is_drawn_and_changed_is_a_plan_that_keeps_the_rules(space, seed):
    rng = np.random.default_rng(seed)
    for layers in [space.draw(rng), *space.list_blocks()[:2]]:
        check(space, layers)
        for _ in range(10):
            layers = space.mutate(layers, rng)
            check(space, layers)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_each_change_alone_keeps_the_rules_and_makes_something_else(mutation):
    space, rng, changed = Space("aabb" * 3, Aim(7, 1, 1), 3), np.random.default_rng(0), 0
    for _ in range(60):
        layers = space.draw(rng)
        other = mutation(space, layers, rng)
        if other is not None:
            check(space, other)
            changed += other != layers
    assert changed > 10


def test_blocks_are_all_there_the_deepest_first():
    space = Space([None] * 6, Aim(4, 1, 1))
    assert [deleted(space, layers) for layers in space.list_blocks()] == [(3, 4), (2, 3), (1, 2)]
    assert Space([None] * 6, Aim(2, 1, 1)).list_blocks() == [keep_layers([0, 5])]
    with pytest.raises(PlanError, match="cannot be reached"):
        Space([None] * 6, Aim(1, 1, 1)).list_blocks()


def test_without_groups_every_deletion_is_reached_and_nothing_else():
    space, rng = Space([None] * 7, Aim(4, 1, 1)), np.random.default_rng(0)
    every = set(combinations(range(1, 6), 3))
    seen = {space.list_blocks()[0]}
    # Over and over from wherever the last change led.
    for _ in range(2000):
        seen.add(space.mutate(sorted(seen, key=str)[int(rng.integers(len(seen)))], rng))
    assert {deleted(space, layers) for layers in seen} == every
    assert all(layer.is_copy for layers in seen for layer in layers)


def test_a_deletion_becomes_every_group_there_is_and_a_group_a_deletion():
    """Of three layers the middle pair or either may go; with one out, six sums and eight halves, or nothing."""
    space, rng = Space([None] * 3, Aim(2), 2), np.random.default_rng(0)
    found = set()
    layers = space.delete([1])
    for _ in range(3000):
        layers = space.mutate(layers, rng)
        found.add(layers)
    deletions = [keep_layers(kept) for kept in ([0, 1], [0, 2], [1, 2])]
    groups = []
    for a, rest in (((0, 1), 2), ((1, 2), 0)):
        made = [MergedLayer(a, weights) for weights in ((0.5, 0.5), (0.75, 0.25), (0.25, 0.75))]
        made += [MergedLayer(a, attention=(x,), mlp=(y,)) for x in a for y in a]
        groups += [tuple(sorted([group, *keep_layers([rest])], key=lambda layer: layer.sources)) for group in made]
    assert found == {*deletions, *groups}


def test_a_block_moves_as_a_whole():
    space, rng = Space([None] * 12, Aim(8, 1, 1)), np.random.default_rng(0)
    move = next(mutation for mutation in MUTATIONS if mutation.__name__ == "_move_block")
    start = space.delete([3, 4, 5, 6])
    moved = {deleted(space, move(space, start, rng)) for _ in range(200)}
    assert moved == {tuple(range(first, first + 4)) for first in (1, 2, 4, 5, 6, 7)}


def test_what_was_seen_is_not_offered_again_and_an_end_is_found():
    space, rng = Space([None] * 5, Aim(4, 1, 1)), np.random.default_rng(0)
    seen = set()
    for layers in draw_unseen(space, seen, rng, 100):
        assert layers not in seen
        seen.add(layers)
    assert {deleted(space, layers) for layers in seen} == {(1,), (2,), (3,)}
    assert list(mutate_unseen(space, space.delete([2]), seen, rng, 100)) == []


def test_every_run_and_every_group_is_a_step():
    space = Space([None] * 10, Aim(5, 1, 1), 3)
    group, half = MergedLayer((4, 5), (0.25, 0.75)), MergedLayer((7, 8), attention=(8,), mlp=(7,))
    layers = (*keep_layers([0, 3]), group, half, *keep_layers([9]))
    assert list_changes(space, layers, 0.5) == (
        Step((1, 2), (), 0.5, 0.0),
        Step((4,), (5,), 0.5, 0.25),
        Step((6,), (), 0.5, 0.0),
        Step((7,), (8,), 0.5, 0.0),
    )


def test_a_mean_is_of_one_kind_only():
    space = Space("aab", Aim(2), 3)
    assert space.average([0, 1]) == MergedLayer((0, 1), (0.5, 0.5))
    assert space.average([1, 2]) == MergedLayer((2,), (1.0,))
