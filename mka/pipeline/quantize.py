"""Quantize: the linear layers' weights rounded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.pipeline.foresee import candidate_nbytes, whole_model
from mka.pipeline.job import Job
from mka.pipeline.merge import describe_model
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.recipe import QuantizeSettings
from mka.terminal import show_progress
from mka.transforms.rtn import quantize_checkpoint


def write_quantized(checkpoint: Checkpoint, settings: QuantizeSettings, output: Path) -> dict[str, Any]:
    """Quantize, verify with a stranger's loader, publish; returns what the loader found.

    Raises:
        RecipeError: if the group size does not fit.
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    linear = sum(len(t.shape) == 2 for i in range(checkpoint.layers) for t in checkpoint.layer_tensors(i).values())
    with show_progress("round weights", linear, "matrix") as advance:
        return quantize_checkpoint(checkpoint, output, settings, verify=verify_checkpoint, on_module=advance)


def describe_rounding(settings: QuantizeSettings) -> str:
    """Say what rounded weights are stored as, e.g. "int8 in groups of 64"."""
    return f"{settings.scheme} in groups of {settings.group_size}"


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    settings, output = job.recipe.quantize, folder / MODEL_FOLDER
    source = open_checkpoint(find_model(found).folder / MODEL_FOLDER, verify=False)
    return describe_model(output, write_quantized(source, settings, output), describe_rounding(settings))


QUANTIZE = Stage(
    "quantize",
    version=2,
    wanted=lambda job: job.recipe.quantize.scheme != "off",
    reads=lambda job, found: {"merged": find_model(found).digest},
    settings=lambda job: job.recipe.quantize.model_dump(),
    make=_make,
    foresee=lambda job: Cost(memory=2 * whole_model(job), disk=candidate_nbytes(job)),
    describe=lambda job: f"quantize to {job.recipe.quantize.scheme}",
)
