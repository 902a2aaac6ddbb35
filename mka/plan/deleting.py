"""Deletions: the least important layers, or one block. Pure: numbers in, output layers out."""

import numpy as np

from mka.plan.plan import MergedLayer, Step, keep_layers
from mka.plan.target import refuse_unreachable


def delete_block(
    distances: np.ndarray, layers_out: int, *, protect_first: int, protect_last: int
) -> tuple[tuple[MergedLayer, ...], tuple[Step, ...]]:
    """Delete the block of least distance that protection allows, as a whole; ties go to the deeper block.

    Args:
        distances: (L, L), of `measure_blocks`.
        layers_out: layers to keep.
        protect_first: layers at the start that are kept.
        protect_last: layers at the end that are kept.

    Raises:
        PlanError: if protection leaves too few layers to delete.
    """
    count = distances.shape[0]
    free = deletable_layers(count, layers_out, protect_first=protect_first, protect_last=protect_last)
    remove = count - layers_out
    if not remove:
        return keep_layers(range(count)), ()
    candidates = {i: float(distances[i, i + remove - 1]) for i in free[: len(free) - remove + 1]}
    first = min(candidates, key=lambda i: (candidates[i], -i))
    block = tuple(range(first, first + remove))
    return keep_layers([i for i in range(count) if i not in block]), (Step(block, (), candidates[first], 0.0),)


def deletable_layers(count: int, layers_out: int, *, protect_first: int, protect_last: int) -> range:
    """Return the layers that protection leaves free.

    Args:
        count: L of the base model.
        layers_out: layers to keep.
        protect_first: layers at the start that are kept.
        protect_last: layers at the end that are kept.

    Raises:
        PlanError: if they are too few to reach ``layers_out`` by deletion.
    """
    free = range(protect_first, max(protect_first, count - protect_last))
    refuse_unreachable(layers_out, count - len(free), protect_first, protect_last)
    return free


def delete_least_important(
    importance: np.ndarray, layers_out: int, *, protect_first: int, protect_last: int
) -> tuple[tuple[MergedLayer, ...], tuple[Step, ...]]:
    """Delete the layers of least importance; ties go to the deeper layer.

    Args:
        importance: (L,), low means removable.
        layers_out: layers to keep.
        protect_first: layers at the start that are kept.
        protect_last: layers at the end that are kept.

    Raises:
        PlanError: if protection leaves too few layers to delete.
    """
    count = importance.shape[0]
    free = deletable_layers(count, layers_out, protect_first=protect_first, protect_last=protect_last)
    remove = count - layers_out
    order = sorted(free, key=lambda i: (importance[i], -i))[:remove]
    steps = tuple(Step((i,), (), float(importance[i]), 0.0) for i in order)
    return keep_layers([i for i in range(count) if i not in order]), steps
