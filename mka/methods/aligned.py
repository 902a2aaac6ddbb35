"""Aligned merging, the project's own: NPIB proposes groups of layers, the divergence of an aligned merge decides.

Each group of neighbouring layers becomes one layer. Its attention is that of the layer whose attention the base misses
most; its MLP is made of the neurons of the whole group that predict the base best (`operator: concat-select`), or is
the MLP the base misses most (`keep`). Which groups: a partition of all layers at the least sum of divergences, each
measured with that one group replaced by what the base misses most of it, refitted
(`mka.plan.grouping.partition_layers`). The plan is meant to be written with `alignment: {enabled: true}`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mka.errors import PlanError
from mka.evidence.needs import HIDDEN_STATES, TRIALS, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.plan.deleting import deletable_layers
from mka.plan.grouping import count_merged, merge_adjacent, partition_layers
from mka.plan.plan import Decision, MergedLayer, Step, take_layers
from mka.plan.target import Aim
from mka.sections import Section
from mka.similarity.npib import SimilaritySettings, score_similarity


class Settings(Section):
    """Settings of aligned merging."""

    selection: Literal["similarity", "divergence", "both"] = Field(
        "both", description="'similarity': NPIB alone; 'divergence': all groups are tried; 'both': NPIB proposes some"
    )
    operator: Literal["average", "keep", "concat-select"] = Field(
        "concat-select", description="What a group becomes: the mean, one survivor, or the best neurons of all"
    )
    largest: int = Field(4, ge=2, le=8, description="Layers in the largest group")
    proposed: float = Field(0.5, gt=0, le=1, description="Share of the groups that NPIB proposes, with selection: both")
    tokens: int = Field(4096, ge=256, description="Calibration tokens a trial is fitted on")
    heldout_tokens: int = Field(1024, ge=64, description="Further calibration tokens its divergence is measured on")
    context: int = Field(512, ge=16, description="Tokens per window of a trial")
    copying: float = Field(
        0.05, ge=0, description="Weight of the divergence on random tokens said twice, beside that on held-out text"
    )


def score(evidence: Evidence, settings: Settings) -> LayerScores:
    """NPIB similarity of every pair of layers, (L, L), with MKA's default settings."""
    assert evidence.states is not None
    scores = score_similarity(evidence.states, SimilaritySettings(), "aligned", evidence.on_progress)
    # Scores carry settings of the method; those of the similarity are not for choosing here.
    return replace(scores, settings={})


def decide(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> Decision:
    """Partition the layers into groups and say what each becomes."""
    assert scores is not None
    if scores.layers != evidence.layers:
        raise PlanError(f"scores are of {scores.layers} layers, the model has {evidence.layers}")
    if settings.selection == "similarity":
        spans = _group_by_similarity(evidence, scores.values, aim, settings)
        made = {span: _make(span, (span[0], span[0]), settings) for span in spans if span[0] < span[1]}
        costs = {span: float(scores.values[span]) for span in made}
    else:
        made, costs = _try_groups(evidence, scores.values, aim, settings)
        spans = partition_layers(costs, evidence.layers, aim.layers_out)
    layers = tuple(made[span] if span in made else MergedLayer((span[0],), (1.0,)) for span in spans)
    first_is_best = -1.0 if settings.selection == "similarity" else 1.0
    merged = sorted((span for span in spans if span in made), key=lambda span: first_is_best * costs[span])
    steps = tuple(
        Step((a,), tuple(range(a + 1, b + 1)), costs[a, b], sum(made[a, b].weights[:1], 0.0)) for a, b in merged
    )
    return Decision(layers, steps)


def _group_by_similarity(
    evidence: Evidence, similarity: np.ndarray, aim: Aim, settings: Settings
) -> list[tuple[int, int]]:
    merged = merge_adjacent(
        similarity,
        aim.layers_out,
        kinds=evidence.kinds if settings.operator == "average" else [None] * evidence.layers,
        protect_first=aim.protect_first,
        protect_last=aim.protect_last,
        choose_weight=lambda layers, position, score: 1.0,
    )
    return [(layer.sources[0], layer.sources[-1]) for layer in merged.layers]


def _make(span: tuple[int, int], survivors: tuple[int, ...], settings: Settings) -> MergedLayer:
    """Return what a group becomes; survivors are the layers whose attention and whose MLP it cannot do without."""
    sources = tuple(range(span[0], span[1] + 1))
    attention, mlp = survivors
    if settings.operator == "average":
        return MergedLayer(sources, (1.0 / len(sources),) * len(sources))
    return take_layers(sources, (attention,), (mlp,) if settings.operator == "keep" else sources)


def _try_groups(
    evidence: Evidence, similarity: np.ndarray, aim: Aim, settings: Settings
) -> tuple[dict[tuple[int, int], MergedLayer], dict[tuple[int, int], float]]:
    trials = evidence.trials
    assert trials is not None
    deletable_layers(evidence.layers, aim)
    spans = _list_groups(evidence.layers, aim, settings)
    if settings.operator == "average":
        spans = [(a, b) for a, b in spans if len(set(evidence.kinds[a : b + 1])) == 1]
    if settings.selection == "both":
        spans = _propose(spans, similarity, settings.proposed)
    # Refuses a target that no partition reaches, before the trials run.
    partition_layers(dict.fromkeys(spans, 0.0), evidence.layers, aim.layers_out)
    # Choosing neurons would treble the cost of a trial; what one survivor loses says how alike the group is.
    tried = settings.model_copy(update={"operator": "keep"}) if settings.operator == "concat-select" else settings
    made, costs = {}, {}
    for a, b in spans:
        survivors = tuple(max(range(a, b + 1), key=miss) for miss in (trials.measure_attention, trials.measure_mlp))
        made[a, b] = _make((a, b), survivors, settings)
        costs[a, b] = trials.measure_group(_make((a, b), survivors, tried))
        if evidence.on_progress:
            evidence.on_progress(1)
    return made, costs


def _list_groups(layers: int, aim: Aim, settings: Settings) -> list[tuple[int, int]]:
    first, stop = aim.protect_first, layers - aim.protect_last
    return [(a, a + n - 1) for n in range(2, settings.largest + 1) for a in range(first, stop - n + 1)]


def _propose(spans: list[tuple[int, int]], similarity: np.ndarray, share: float) -> list[tuple[int, int]]:
    """Keep the share of groups, size by size, whose first and last outputs are most alike."""
    kept = []
    for size in sorted({b - a for a, b in spans}):
        alike = sorted((s for s in spans if s[1] - s[0] == size), key=lambda s: -similarity[s])
        kept += sorted(alike[: _count_proposed(len(alike), share)])
    return kept


def _count_proposed(groups: int, share: float) -> int:
    return max(1, round(share * groups))


def count_units(layers: int, aim: Aim, settings: Settings) -> tuple[int, str]:
    """Groups that are tried; merges where nothing is tried."""
    if settings.selection == "similarity":
        return layers - aim.layers_out, "merge"
    sizes = Counter(b - a for a, b in _list_groups(layers, aim, settings))
    share = settings.proposed if settings.selection == "both" else 1.0
    return sum(_count_proposed(groups, share) for groups in sizes.values()), "group"


def count_fewest(kinds: Sequence[Any], aim: Aim, settings: Settings) -> int:
    """Fewest layers that groups leave, if all of them may be formed."""
    largest = math.inf if settings.selection == "similarity" else settings.largest
    return count_merged(kinds if settings.operator == "average" else [None] * len(kinds), aim, largest)


def needs(settings: Settings) -> frozenset[str]:
    """Hidden states for NPIB; trials where divergence decides."""
    return frozenset({HIDDEN_STATES} if settings.selection == "similarity" else {HIDDEN_STATES, TRIALS})


METHOD = Method(
    name="aligned",
    summary="Merge groups by NPIB and aligned divergence, keeping the neurons that matter; refit while merging",
    label="Aligned merging: groups proposed by NPIB and chosen by aligned divergence, refit in closed form",
    source="docs/method.md",
    settings=Settings,
    decide=decide,
    needs=needs,
    score=score,
    plan_settings=frozenset(Settings.model_fields),
    competing=lambda settings: settings.largest if settings.operator == "concat-select" else 1,
    units=count_units,
    fewest=count_fewest,
)
