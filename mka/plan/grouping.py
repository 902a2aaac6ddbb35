"""From similarities to groups and weights. Pure: numbers in, output layers out."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mka.errors import PlanError
from mka.plan.plan import Decision, MergedLayer, Step, identity_layers
from mka.plan.target import Aim, refuse_unreachable


def merge_adjacent(
    similarity: np.ndarray,
    layers_out: int,
    *,
    kinds: Sequence[Any],
    protect_first: int,
    protect_last: int,
    choose_weight: Callable[[Sequence[MergedLayer], int, float], float],
    rescore: Callable[[Sequence[MergedLayer]], np.ndarray] | None = None,
    on_merge: Callable[[], Any] | None = None,
) -> Decision:
    """Merge the most similar adjacent groups, one pair at a time, until ``layers_out`` remain.

    A group is represented by its last layer: what a merged layer has to reproduce is the hidden state after the
    group. Ties go to the deeper pair. Merging group a (weights a_i) with group b by weight w gives
    ``w * a_i`` and ``(1 - w) * b_j``, so weights stay a convex combination of source layers.

    Args:
        similarity: (L, L) between source layers, high means alike.
        layers_out: groups to stop at.
        kinds: one value per source layer; only equal kinds merge.
        protect_first: layers at the start left alone.
        protect_last: layers at the end left alone.
        choose_weight: ``(layers so far, position of the left group, similarity) -> weight of the left group``.
        rescore: if given, called with the layers after each merge; returns their similarity matrix
            (groups, groups). Without it the source layers' matrix is used throughout (one-shot).
        on_merge: called after each merge (for a progress bar).

    Raises:
        PlanError: if protection and kinds leave no pair to merge before the target is reached.
    """
    count = similarity.shape[0]
    layers = list(identity_layers(count))
    steps: list[Step] = []
    current = similarity
    while len(layers) > layers_out:
        candidates = [
            p
            for p in range(len(layers) - 1)
            if layers[p].sources[0] >= protect_first
            and layers[p + 1].sources[-1] < count - protect_last
            and kinds[layers[p].sources[0]] == kinds[layers[p + 1].sources[0]]
        ]
        if not candidates:
            refuse_unreachable(layers_out, len(layers), protect_first, protect_last)
        if rescore and steps:
            current = rescore(layers)
            scores = {p: float(current[p, p + 1]) for p in candidates}
        else:
            scores = {p: float(current[layers[p].sources[-1], layers[p + 1].sources[-1]]) for p in candidates}
        best = max(candidates, key=lambda p: (scores[p], p))
        weight = choose_weight(layers, best, scores[best])
        left, right = layers[best], layers[best + 1]
        steps.append(Step(left.sources, right.sources, scores[best], weight))
        layers[best : best + 2] = [join_layers(left, right, weight)]
        if on_merge:
            on_merge()
    return Decision(tuple(layers), tuple(steps))


def count_merged(kinds: Sequence[Any], aim: Aim, largest: float = math.inf) -> int:
    """Return the fewest layers that merging neighbours of one kind can leave.

    Args:
        kinds: one value per source layer.
        aim: how many at either end stay as they are.
        largest: most layers that become one.
    """
    free = kinds[aim.protect_first : max(aim.protect_first, len(kinds) - aim.protect_last)]
    runs = (len(list(run)) for _, run in groupby(free))
    return len(kinds) - len(free) + sum(math.ceil(run / largest) if largest < run else 1 for run in runs)


def join_layers(left: MergedLayer, right: MergedLayer, weight: float) -> MergedLayer:
    """Merge two groups: ``weight`` of the left, the rest of the right."""
    weights = tuple(weight * w for w in left.weights) + tuple((1.0 - weight) * w for w in right.weights)
    return MergedLayer(left.sources + right.sources, weights)


def partition_layers(costs: Mapping[tuple[int, int], float], count: int, layers_out: int) -> list[tuple[int, int]]:
    """Cut ``count`` layers into ``layers_out`` groups of neighbours at the least total cost.

    Costs are taken to add up; a layer on its own costs nothing. Dynamic programming over (layers covered, groups used),
    exact for the costs given.

    Args:
        costs: (first, last) of a group of two or more layers -> its cost; groups not listed are not allowed.
        count: L.
        layers_out: groups wanted.

    Returns:
        (first, last) of every group, in order.

    Raises:
        PlanError: if no allowed groups make up the target.
    """
    ending: dict[int, list[tuple[int, float]]] = {last: [(last, 0.0)] for last in range(count)}
    for (first, last), cost in costs.items():
        ending[last].append((first, cost))
    # best[n][g]: least cost of the first n layers in g groups, and where the last of them starts.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for covered in range(1, count + 1):
        row: dict[int, tuple[float, int]] = {}
        for first, cost in ending[covered - 1]:
            for groups, (total, _) in best[first].items():
                if groups + 1 not in row or total + cost < row[groups + 1][0]:
                    row[groups + 1] = (total + cost, first)
        best.append(row)
    if layers_out not in best[count]:
        raise PlanError(
            f"target of {layers_out} layers cannot be reached with the {len(costs)} groups allowed (within reach: "
            f"{', '.join(map(str, sorted(best[count])))}); allow larger or more groups, or protect fewer layers"
        )
    found, covered = [], count
    for groups in range(layers_out, 0, -1):
        first = best[covered][groups][1]
        found.append((first, covered - 1))
        covered = first
    return found[::-1]
