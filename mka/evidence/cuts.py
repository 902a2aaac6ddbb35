"""Where a deletion cuts the residual stream, and what entered and left the deleted layers there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mka.errors import PlanError
from mka.model.families import Family
from mka.plan.plan import MergePlan


@dataclass(frozen=True)
class Cut:
    """A maximal run of deleted source layers.

    Attributes:
        deleted: the source layers, rising and adjacent.
        position: output layers before the cut; 0 if nothing but the embedding is.
    """

    deleted: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class CutTokens:
    """The base model's residual stream at a cut, for n real tokens; (n, D) float64.

    Attributes:
        entering: X, what enters the first deleted layer.
        leaving: Y, what leaves the last deleted layer, before any final norm.
        mlp: M, what the MLP of the layer before the cut adds to the stream (behind a post-norm, where there is one);
            None at a cut with no layer before it. ``X - M`` is the stream after that layer's attention.
    """

    entering: np.ndarray
    leaving: np.ndarray
    mlp: np.ndarray | None


@dataclass(frozen=True)
class CutEvidence:
    """What a method fits its folds to.

    Attributes:
        family: of the base model.
        tied: the language-model head is the embedding.
        cuts: of the plan, from the first layer on.
        stream: runs the base model once over the calibration texts; yields each batch's tokens, cut by cut.
    """

    family: Family
    tied: bool
    cuts: tuple[Cut, ...]
    stream: Callable[[], Iterator[tuple[Cut, CutTokens]]]


def find_cuts(plan: MergePlan) -> tuple[Cut, ...]:
    """Find the cuts of a plan that deletes layers and merges none.

    Raises:
        PlanError: if it merges layers.
    """
    if plan.merged:
        raise PlanError(f"plan merges layers {list(plan.merged[0].sources)}; folds are fitted to deletions only")
    cuts = []
    for _, run in groupby(enumerate(plan.removed), key=lambda pair: pair[1] - pair[0]):
        deleted = tuple(layer for _, layer in run)
        cuts.append(Cut(deleted, sum(layer.sources[0] < deleted[0] for layer in plan.layers)))
    return tuple(cuts)
