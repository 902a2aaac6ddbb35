"""MKA: merge adjacent layers whose hidden states, seen through a diffusion map, share the most information.

Source: "Pruning via Merging: Compressing LLMs via Manifold Alignment Based Layer Merging", arXiv 2406.16330, in the
well-posed form of docs/method.md (kernel over texts, joint mutual information, a normalisation with a real range).
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mka.errors import PlanError
from mka.evidence.needs import DIVERGENCE, HIDDEN_STATES, REOBSERVE, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.plan.grouping import count_merged, join_layers, merge_adjacent
from mka.plan.plan import Decision
from mka.plan.target import Aim
from mka.similarity.npib import SimilaritySettings, score_similarity


class Settings(SimilaritySettings):
    """Settings of MKA."""

    selection: Literal["one-shot", "iterative"] = Field(
        "one-shot", description="'iterative' observes the model again after every merge"
    )
    weights: Literal["similarity", "fixed", "line-search"] = Field(
        "similarity",
        description="Share of the earlier layer: its similarity (the paper), a constant, or searched on KL",
    )
    weight: float | None = Field(None, ge=0, le=1, description="The constant, with weights: fixed")
    grid: tuple[float, ...] | None = Field(None, description="Weights tried, with weights: line-search; has 0 and 1")

    @model_validator(mode="after")
    def _no_idle_settings(self) -> "Settings":
        if (self.weight is not None) != (self.weights == "fixed"):
            raise ValueError("weight goes with weights: fixed, and only with it")
        if self.grid is not None and self.weights != "line-search":
            raise ValueError("grid goes with weights: line-search")
        if self.grid is not None and not ({0.0, 1.0} <= set(self.grid) and all(0 <= w <= 1 for w in self.grid)):
            raise ValueError("grid must lie in [0, 1] and include 0 and 1 (deleting either layer)")
        return self


DEFAULT_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def score(evidence: Evidence, settings: Settings) -> LayerScores:
    """NPIB similarity of every pair of layers, (L, L)."""
    assert evidence.states is not None
    return score_similarity(evidence.states, settings, "mka", evidence.on_progress)


def decide(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> Decision:
    """Merge the most similar adjacent pairs of the same kind."""
    assert scores is not None
    if scores.layers != evidence.layers:
        raise PlanError(f"scores are of {scores.layers} layers, the model has {evidence.layers}")

    def choose_weight(layers: Any, position: int, similarity: float) -> float:
        if settings.weights == "similarity":
            return float(np.clip(similarity, 0.0, 1.0))
        if settings.weights == "fixed":
            assert settings.weight is not None
            return settings.weight
        return _search_weight(evidence, layers, position, settings.grid or DEFAULT_GRID)

    def rescore(layers: Any) -> np.ndarray:
        assert evidence.reobserve is not None
        return score_similarity(evidence.reobserve(layers), settings, "mka").values

    return merge_adjacent(
        scores.values,
        aim.layers_out,
        kinds=evidence.kinds,
        protect_first=aim.protect_first,
        protect_last=aim.protect_last,
        choose_weight=choose_weight,
        rescore=rescore if settings.selection == "iterative" else None,
        on_merge=(lambda: evidence.on_progress(1)) if evidence.on_progress else None,  # type: ignore[misc]
    )


def _search_weight(evidence: Evidence, layers: Any, position: int, grid: tuple[float, ...]) -> float:
    """Weight with the least KL to the base; the grid holds both deletions, so it is never worse than either."""
    assert evidence.divergence is not None

    def divergence_at(weight: float) -> float:
        trial = list(layers)
        trial[position : position + 2] = [join_layers(layers[position], layers[position + 1], weight)]
        assert evidence.divergence is not None
        return evidence.divergence(trial)

    return min(grid, key=divergence_at)


def needs(settings: Settings) -> frozenset[str]:
    """Hidden states always; the model itself for iterative selection or a line search."""
    wanted = {HIDDEN_STATES}
    if settings.selection == "iterative":
        wanted.add(REOBSERVE)
    if settings.weights == "line-search":
        wanted.add(DIVERGENCE)
    return frozenset(wanted)


METHOD = Method(
    name="mka",
    summary="Merge adjacent layers with the highest NPIB similarity of their diffusion-map embeddings",
    label="MKA, layers merged by weighted average after folding norm gains",
    source="arXiv 2406.16330; docs/method.md",
    settings=Settings,
    decide=decide,
    needs=needs,
    score=score,
    plan_settings=frozenset({"selection", "weights", "weight", "grid"}),
    fewest=lambda kinds, aim, settings: count_merged(kinds, aim),
)
