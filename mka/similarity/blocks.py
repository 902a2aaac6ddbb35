"""Layers and contiguous blocks of layers: how far hidden states move across each, and which go. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mka.evidence.needs import Evidence
from mka.evidence.states import LayerScores
from mka.plan.deleting import count_protected, delete_block, delete_least_important
from mka.plan.plan import Decision
from mka.plan.target import Aim
from mka.sections import Section


def measure_blocks(
    pooled: np.ndarray,
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray],
    on_progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Return the mean distance across every block of layers, (L, L): [i, j] is the block from layer i to layer j.

    Args:
        pooled: hidden states, (L+1, N, D); see `mka.evidence.states.HiddenStates`. One of norm 0 has no direction: NaN.
        distance: of rows of two (N, D) float64 arrays of unit vectors, (N,).
        on_progress: called with 1 for each pair of layers.
    """
    count = pooled.shape[0] - 1
    with np.errstate(invalid="ignore"):
        points = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pooled.astype(np.float64)]
    values = np.empty((count, count))
    for first in range(count):
        for last in range(first, count):
            values[first, last] = values[last, first] = distance(points[first], points[last + 1]).mean()
            if on_progress:
                on_progress(1)
    return values


def cosine_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Half the cosine distance of rows of x and y, ``(1 - cos) / 2``, (N, D) float64 unit vectors, (N,).

    By ``|x - y|^2 / 4``, which keeps small distances and gives 0 for equal rows.
    """
    return ((x - y) ** 2).sum(axis=1) / 4


def score_influence(evidence: Evidence, settings: Section, *, method: str) -> LayerScores:
    """Block Influence of every layer, (L,), as scores of a method: 1 - mean cosine between its input and its output."""
    assert evidence.states is not None
    meaning = "Block Influence, 1 - mean cosine of a layer's input and output (0: changes nothing, 2: reverses)"
    values = evidence.states.block_influence
    return LayerScores("layer-importance", values, meaning, method, settings.model_dump(mode="json"))


def score_cosine(evidence: Evidence, settings: Section, *, method: str) -> LayerScores:
    """Half the mean cosine distance across every block of layers, (L, L), as scores of a method."""
    assert evidence.states is not None
    values = measure_blocks(evidence.states.pooled, cosine_distance, evidence.on_progress)
    meaning = "Half the cosine distance across a block of layers (0: same direction, 0.5: right angles, 1: opposite)"
    return LayerScores("block-distance", values, meaning, method, settings.model_dump(mode="json"))


def delete_scored_layers(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Section) -> Decision:
    """Delete the layers that scores of their importance put last; for refusals see `delete_least_important`."""
    assert scores is not None
    return delete_least_important(scores.values, aim)


def count_kept(kinds: Sequence[Any], aim: Aim, settings: Section, *, kept: int = 0) -> int:
    """Return the fewest layers that `delete_scored_block` leaves."""
    return count_protected(len(kinds), replace(aim, protect_first=max(kept, aim.protect_first)))


def delete_scored_block(
    evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Section, *, kept: int = 0
) -> Decision:
    """Delete the block of least distance, never of the first ``kept`` layers; for refusals see `delete_block`."""
    assert scores is not None
    return delete_block(scores.values, replace(aim, protect_first=max(kept, aim.protect_first)))
