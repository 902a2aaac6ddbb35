"""What measuring costs, counted by hand."""

import pytest

from mka.plan.budget import Budget, count_front, count_healing, count_run, count_untouched, count_walk
from mka.plan.plan import MergedLayer, identity_layers, keep_layers

GROUP = MergedLayer((2, 3), (0.5, 0.5))


@pytest.mark.parametrize(
    ("layers", "front", "untouched"),
    [
        (identity_layers(6), 6, 6),
        (keep_layers([0, 1, 4, 5]), 2, 1),  # layer 1 makes up for layers 2 and 3
        (keep_layers([2, 3, 4, 5]), 0, 0),  # nothing is in front of the first
        ((*keep_layers([0, 1]), GROUP, *keep_layers([4, 5])), 2, 2),  # the group answers for itself
        ((*keep_layers([0]), GROUP, *keep_layers([4, 5])), 1, 0),  # layer 1 is gone as well
    ],
)
def test_what_stands_in_front_of_the_first_change(layers, front, untouched):
    assert (count_front(layers), count_untouched(layers)) == (front, untouched)
    assert count_run(layers, 10) == 10 * (len(layers) - front)
    assert count_walk(layers, 6, 10) == 10 * (6 + len(layers) - untouched)


def test_the_last_layers_deleted_cost_a_run_nothing():
    """The base has been run through those that stay; an alignment refits the last of them."""
    assert count_run(keep_layers(range(4)), 10) == 0


@pytest.mark.parametrize(
    ("layers", "plain", "refitted"),
    [
        # Teacher 6 layers; of the student's four the last two differ, or the last three: one is refitted.
        (keep_layers([0, 1, 4, 5]), 3, 3),  # three are trained in any case
        (keep_layers([2, 3, 4, 5]), 4, 4),
        (keep_layers([0, 2, 3, 4, 5]), 4, 5),
        (keep_layers(range(4)), 3, 3),
        ((*keep_layers([0]), GROUP, *keep_layers([4, 5])), 3, 4),
    ],
)
def test_a_healing_counts_a_token_backwards_twice(layers, plain, refitted):
    def by_hand(trained):
        training = 100 * (6 + trained) + 2 * 100 * trained
        return training + 10 * (6 + trained) + 10 * (6 + trained)

    assert count_healing(layers, 6, 100, 10) == by_hand(plain)
    assert count_healing(layers, 6, 100, 10, 7) == by_hand(refitted) + count_walk(layers, 6, 7)


def test_a_budget_is_whole_and_kept():
    told = []
    budget = Budget(10, 4, told.append)
    budget.spend("run", 3)
    budget.spend("run", 3)
    budget.spend("walk", 33)
    assert told == [0, 1, 8] and budget.spent == 39 / 4
    assert budget.affords(1) and not budget.affords(2)
    assert budget.counts == {"run": 2, "walk": 1}
    with pytest.raises(AssertionError):
        budget.spend("run", 2)
