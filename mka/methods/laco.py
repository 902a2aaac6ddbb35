"""LaCo: collapse runs of layers into their first one, from the deepest up, while the output keeps its direction.

Source: Yang et al., "LaCo: Large Language Model Pruning via Layer Collapse", arXiv 2402.11187. Layer l absorbs the m
layers after it by adding their differences to it::

    theta*_l = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l) = (1 - m) theta_l + sum_{k=1..m} theta_{l+k}

that is, weights 1 - m, 1, ..., 1, which sum to 1. The walk starts at the deepest window of C layers (m = C - 1). A
collapse is accepted if the mean cosine of the model's and the base's final hidden states over calibration texts is
above a threshold; then the walk moves I layers up, otherwise one layer up.

Where this departs from the source:

- The source fixes the threshold and takes the number of layers that comes out. Here the target is met exactly: a walk
  that ends above it is repeated from the base with the threshold times ``relax``, and the last collapse is shortened.
  Below a threshold of 0.01 every collapse is accepted, and walks go on from what the one before left.
- The released program subtracts the running sum in place of theta_l, which telescopes: it keeps the last layer of the
  window alone. This is the formula.
- The cosine is of each text's last token (the released program flattens all tokens into one vector).
- Norm gains are folded before layers are summed, protection applies, and layers of different kinds never merge.
"""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from pydantic import Field

from mka.evidence.needs import OUTPUT_SIMILARITY, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.plan.grouping import count_merged
from mka.plan.plan import Decision, MergedLayer, Step, identity_layers
from mka.plan.target import Aim, refuse_unreachable
from mka.sections import Section

Layers = tuple[MergedLayer, ...]
Steps = tuple[Step, ...]
LOWEST = 0.01  # a threshold below this is dropped


class Settings(Section):
    """Settings of LaCo."""

    merge_layers: int = Field(4, ge=2, description="Layers that become one in a collapse (C): the first and C - 1 more")
    interval: int = Field(2, ge=1, description="Layers the walk moves up after an accepted collapse (I)")
    threshold: float = Field(0.65, ge=0, lt=1, description="Cosine of final hidden states a collapse must exceed (T)")
    relax: float = Field(0.9, gt=0, lt=1, description="Factor on the threshold after a walk that ends above the target")


def collapse_layers(group: Sequence[MergedLayer]) -> MergedLayer:
    """Collapse a run of output layers into its first: weights 1 - m for it and 1 for each of the m others."""
    first, *others = group
    # Adding zero turns -0.0 into 0.0, which reads better in a plan.
    weights = tuple((1.0 - len(others)) * w + 0.0 for w in first.weights) + tuple(w for o in others for w in o.weights)
    return MergedLayer(tuple(i for layer in group for i in layer.sources), weights)


def decide(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> Decision:
    """Walk with an ever lower threshold until the target is met. A step's score is the cosine after it."""
    fewest = count_merged(evidence.kinds, aim)
    refuse_unreachable(aim.layers_out, fewest, aim.protect_first, aim.protect_last)
    walk = _Walk(evidence, aim, settings)
    base = identity_layers(evidence.layers)
    layers: Layers = base
    steps: Steps = ()
    threshold = settings.threshold
    while len(layers) > aim.layers_out:
        if threshold >= LOWEST:
            layers, steps = walk(base, (), threshold, settings.merge_layers)
        else:
            layers, steps = walk(layers, steps, -math.inf, 2)
        threshold *= settings.relax
    return Decision(layers, steps)


class _Walk:
    """One walk up the layers; cosines measured once are remembered for the walks after it."""

    def __init__(self, evidence: Evidence, aim: Aim, settings: Settings) -> None:
        self.evidence, self.aim, self.settings = evidence, aim, settings
        self.cosines: dict[Layers, float] = {}
        self.fewest = evidence.layers

    def __call__(self, layers: Layers, steps: Steps, threshold: float, first_window: int) -> tuple[Layers, Steps]:
        """Collapse from the deepest window of ``first_window`` unprotected layers up, or until the target is met."""
        position = max(self.aim.protect_first, len(layers) - self.aim.protect_last - first_window)
        while position >= self.aim.protect_first and len(layers) > self.aim.layers_out:
            count = self._count_mergeable(layers, position)
            group = layers[position : position + 1 + count]
            collapsed = collapse_layers(group)
            trial = (*layers[:position], collapsed, *layers[position + 1 + count :])
            if count and self._measure(trial) > threshold:
                right = collapsed.sources[len(group[0].sources) :]
                steps = (*steps, Step(group[0].sources, right, self.cosines[trial], 1.0 - count))
                layers = trial
                position -= self.settings.interval
                self._advance(len(layers))
            else:
                position -= 1
        return layers, steps

    def _count_mergeable(self, layers: Layers, position: int) -> int:
        """Layers after ``position`` that may collapse into it: alike, unprotected, and no more than have to go."""
        most = min(self.settings.merge_layers - 1, len(layers) - self.aim.layers_out)
        after = layers[position + 1 : len(layers) - self.aim.protect_last][:most]
        kind = self._kind(layers[position])
        return len(list(takewhile(lambda layer: self._kind(layer) == kind, after)))

    def _kind(self, layer: MergedLayer) -> Any:
        return self.evidence.kinds[layer.sources[0]]

    def _measure(self, layers: Layers) -> float:
        if layers not in self.cosines:
            assert self.evidence.output_similarity is not None
            self.cosines[layers] = self.evidence.output_similarity(layers)
        return self.cosines[layers]

    def _advance(self, count: int) -> None:
        if count < self.fewest and self.evidence.on_progress:
            self.evidence.on_progress(self.fewest - count)
        self.fewest = min(self.fewest, count)


METHOD = Method(
    name="laco",
    summary="Collapse runs of layers into their first, from the deepest up, while the output keeps its direction",
    label="LaCo, layers collapsed by summed differences after folding norm gains",
    source="arXiv 2402.11187",
    settings=Settings,
    decide=decide,
    needs=lambda settings: frozenset({OUTPUT_SIMILARITY}),
    fewest=lambda kinds, aim, settings: count_merged(kinds, aim),
)
