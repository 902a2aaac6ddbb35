"""Observe: hidden states of every layer of the base on the calibration texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.evidence.gather import observe_texts
from mka.evidence.needs import HIDDEN_STATES
from mka.evidence.states import HiddenStates
from mka.model.checkpoint import Checkpoint
from mka.pipeline.foresee import estimate_observing
from mka.pipeline.job import Job
from mka.pipeline.stage import STATES_FILE, Cost, Found, Stage
from mka.recipe import CalibrationSettings, ModelSource
from mka.texts.calibration import CalibrationSet


def observe_checkpoint(
    checkpoint: Checkpoint, calibration: CalibrationSet, settings: CalibrationSettings, source: ModelSource
) -> HiddenStates:
    """Observe a checkpoint's layers on its calibration set.

    Raises:
        CheckpointError: if the model does not load whole.
        NumericsError: if hidden states are not finite.
    """
    from mka.model.loading import open_decoder

    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        return observe_texts(decoder, tokenizer, calibration.texts, settings, "observe layers")


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    assert job.inputs.calibration is not None
    states = observe_checkpoint(job.base, job.inputs.calibration, job.recipe.calibration, job.recipe.model)
    states.save(folder / STATES_FILE)
    return {"layers": states.layers, "samples": len(states.tokens), "tokens": int(states.tokens.sum())}


def _read(job: Job, found: Found) -> dict[str, str]:
    assert job.inputs.calibration is not None
    return {"base": job.base.digest, "calibration": job.inputs.calibration.digest}


OBSERVE = Stage(
    "observe",
    version=1,
    wanted=lambda job: HIDDEN_STATES in job.planner.needs,
    reads=_read,
    settings=lambda job: (
        job.recipe.calibration.model_dump(include={"max_tokens", "pooling"}) | {"dtype": job.recipe.model.dtype}
    ),
    make=_make,
    foresee=lambda job: Cost(memory=estimate_observing(job)),
    describe=lambda job: f"observe {job.base.layers} layers",
)
