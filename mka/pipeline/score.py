"""Score: what the method thinks of the layers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mka.errors import NumericsError, PlanError
from mka.evidence.needs import HIDDEN_STATES, Evidence
from mka.evidence.states import HiddenStates, LayerScores, Stability
from mka.methods import Planner
from mka.model.checkpoint import Checkpoint
from mka.pipeline.job import Job
from mka.pipeline.stage import SCORES_FILE, STATES_FILE, Cost, Found, Stage
from mka.similarity.stability import compare_rankings, draw_halves
from mka.terminal import show_progress


def score_layers(planner: Planner, checkpoint: Checkpoint, states: HiddenStates | None) -> LayerScores | None:
    """Score a checkpoint's layers, pairs of them on half-samples of the texts too; None if the method does not score.

    Raises:
        NumericsError: if scores come out NaN, infinite or out of range.
        PlanError: if the hidden states are of another model.
    """
    if planner.method.score is None:
        return None
    if states is None or states.layers != checkpoint.layers:
        given = "none" if states is None else f"{states.layers} layers"
        raise PlanError(f"method {planner.name!r} needs hidden states of {checkpoint.layers} layers, got {given}")
    pairs = checkpoint.layers * (checkpoint.layers + 1) // 2
    with show_progress("score layer pairs", pairs, "pair") as advance:
        evidence = Evidence(checkpoint.layers, checkpoint.kinds, states, on_progress=advance)
        scores = planner.method.score(evidence, planner.settings)
    if scores.kind != "pairwise-similarity":
        return scores
    return replace(scores, stability=_resample(planner, replace(evidence, on_progress=None), scores))


def _resample(planner: Planner, evidence: Evidence, scores: LayerScores) -> Stability | None:
    """Score half-samples of the texts; None where there are too few, or half of them cannot be scored."""
    assert planner.method.score is not None and evidence.states is not None
    texts, halves = len(evidence.states.tokens), []
    rows = draw_halves(texts)
    try:
        with show_progress("score half-samples", len(rows), "half") as advance:
            for taken in rows:
                half = replace(evidence, states=evidence.states.take_texts(taken))
                halves.append(np.diag(planner.method.score(half, planner.settings).values, 1))
                advance(1)
    except NumericsError:
        return None
    return compare_rankings(np.diag(scores.values, 1), halves, texts)


def open_scores(job: Job, found: Found) -> LayerScores | None:
    """Read what the method thought of the layers; None if it does not score.

    Stored scores serve every job whose other settings only plan; they are read with the settings of this one.
    """
    product = found.get("score")
    if product is None or product.facts["kind"] is None:
        return None
    scores = LayerScores.load(product.open() / SCORES_FILE)
    settings = job.planner.dump_settings()
    return replace(scores, settings={key: settings[key] for key in scores.settings})


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    scores = score_layers(job.planner, job.base, HiddenStates.load(found["observe"].open() / STATES_FILE))
    if scores is None:
        return {"kind": None}
    scores.save(folder / SCORES_FILE)
    return {"kind": scores.kind, "meaning": scores.meaning}


SCORE = Stage(
    "score",
    version=2,
    wanted=lambda job: HIDDEN_STATES in job.planner.needs,
    reads=lambda job, found: {"states": found["observe"].digest},
    settings=lambda job: {"method": job.planner.name, "settings": job.planner.dump_settings(scoring=True)},
    make=_make,
    foresee=lambda job: Cost(files=("evidence/scores.json",) if job.planner.method.score else ()),
    describe=lambda job: f"score layers by {job.planner.name}",
)
