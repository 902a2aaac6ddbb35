"""Deletions: the least important layers, or one block. Pure: numbers in, output layers out."""

import numpy as np

from mka.plan.plan import Decision, Step, keep_layers
from mka.plan.target import Aim, refuse_unreachable


def delete_block(distances: np.ndarray, aim: Aim) -> Decision:
    """Delete the block of least distance that protection allows, as a whole; ties go to the deeper block.

    Args:
        distances: (L, L), of `measure_blocks`.
        aim: layers to keep, and how many at either end are kept.

    Raises:
        PlanError: if protection leaves too few layers to delete.
    """
    count = distances.shape[0]
    free = deletable_layers(count, aim)
    remove = count - aim.layers_out
    if not remove:
        return Decision(keep_layers(range(count)))
    candidates = {i: float(distances[i, i + remove - 1]) for i in free[: len(free) - remove + 1]}
    first = min(candidates, key=lambda i: (candidates[i], -i))
    block = tuple(range(first, first + remove))
    step = Step(block, (), candidates[first], 0.0)
    return Decision(keep_layers([i for i in range(count) if i not in block]), (step,))


def deletable_layers(count: int, aim: Aim) -> range:
    """Return the layers of ``count`` that protection leaves free.

    Raises:
        PlanError: if they are too few to reach the aim by deletion.
    """
    fewest = count_protected(count, aim)
    refuse_unreachable(aim.layers_out, fewest, aim.protect_first, aim.protect_last)
    return range(aim.protect_first, aim.protect_first + count - fewest)


def count_protected(count: int, aim: Aim) -> int:
    """Return how many of ``count`` layers protection keeps: the fewest that deletion can leave."""
    return min(count, aim.protect_first + aim.protect_last)


def delete_least_important(importance: np.ndarray, aim: Aim) -> Decision:
    """Delete the layers of least importance; ties go to the deeper layer.

    Args:
        importance: (L,), low means removable.
        aim: layers to keep, and how many at either end are kept.

    Raises:
        PlanError: if protection leaves too few layers to delete.
    """
    count = importance.shape[0]
    free = deletable_layers(count, aim)
    order = sorted(free, key=lambda i: (importance[i], -i))[: count - aim.layers_out]
    steps = tuple(Step((i,), (), float(importance[i]), 0.0) for i in order)
    return Decision(keep_layers([i for i in range(count) if i not in order]), steps)
