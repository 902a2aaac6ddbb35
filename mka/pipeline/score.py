"""Score: what the method thinks of the layers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mka.errors import PlanError
from mka.evidence.needs import HIDDEN_STATES, Evidence
from mka.evidence.states import HiddenStates, LayerScores
from mka.methods import Planner
from mka.model.checkpoint import Checkpoint
from mka.pipeline.job import Job
from mka.pipeline.stage import SCORES_FILE, STATES_FILE, Cost, Found, Stage
from mka.terminal import show_progress


def score_layers(planner: Planner, checkpoint: Checkpoint, states: HiddenStates | None) -> LayerScores | None:
    """Score a checkpoint's layers; None for a method that does not look at them.

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
        return planner.method.score(evidence, planner.settings)


def open_scores(job: Job, found: Found) -> LayerScores | None:
    """Read what the method thought of the layers; None if it does not score.

    Stored scores serve every job whose other settings only plan; they are read with the settings of this one.
    """
    product = found.get("score")
    if product is None or product.facts["kind"] is None:
        return None
    scores = LayerScores.load(product.folder / SCORES_FILE)
    settings = job.planner.dump_settings()
    return replace(scores, settings={key: settings[key] for key in scores.settings})


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    scores = score_layers(job.planner, job.base, HiddenStates.load(found["observe"].folder / STATES_FILE))
    if scores is None:
        return {"kind": None}
    scores.save(folder / SCORES_FILE)
    return {"kind": scores.kind, "meaning": scores.meaning}


SCORE = Stage(
    "score",
    version=1,
    wanted=lambda job: HIDDEN_STATES in job.planner.needs,
    reads=lambda job, found: {"states": found["observe"].digest},
    settings=lambda job: {"method": job.planner.name, "settings": job.planner.dump_settings(scoring=True)},
    make=_make,
    foresee=lambda job: Cost(files=("evidence/scores.json",) if job.planner.method.score else ()),
    describe=lambda job: f"score layers by {job.planner.name}",
)
