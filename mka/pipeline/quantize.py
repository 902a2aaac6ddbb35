"""Quantize: the linear layers' weights rounded."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.pipeline.foresee import candidate_nbytes, largest_layer, treated_nbytes
from mka.pipeline.job import Job
from mka.pipeline.merge import describe_model
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.pipeline.transform import apply_transform, digest_evidence, key_evidence, offer_evidence
from mka.recipe import QuantizeSettings
from mka.transforms import get_quantizer


def write_quantized(
    checkpoint: Checkpoint,
    settings: QuantizeSettings,
    output: Path,
    evidence: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Quantize, verify with a stranger's loader, publish; returns what the loader found.

    Args:
        checkpoint: unquantized.
        settings: scheme (not "off") and group size.
        output: folder to publish.
        evidence: kind -> what the scheme's transform asks for.

    Raises:
        RecipeError: if the group size does not fit, or evidence is missing.
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    return apply_transform(
        get_quantizer(settings.scheme),
        settings,
        checkpoint,
        evidence,
        output,
        asked=f"quantize.scheme {settings.scheme}",
        verify=verify_checkpoint,
    )


def describe_rounding(settings: QuantizeSettings) -> str:
    """Say what rounded weights are stored as, e.g. "int8 in groups of 64"."""
    return f"{settings.scheme} in groups of {settings.group_size}"


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    settings, output = job.recipe.quantize, folder / MODEL_FOLDER
    source = open_checkpoint(find_model(found).folder / MODEL_FOLDER, verify=False)
    loaded = write_quantized(source, settings, output, offer_evidence(job))
    return describe_model(output, loaded, describe_rounding(settings))


def _needs(job: Job) -> frozenset[str]:
    return get_quantizer(job.recipe.quantize.scheme).needs


QUANTIZE = Stage(
    "quantize",
    version=2,
    wanted=lambda job: job.recipe.quantize.scheme != "off",
    reads=lambda job, found: {"merged": find_model(found).digest} | digest_evidence(job, _needs(job)),
    settings=lambda job: job.recipe.quantize.model_dump() | key_evidence(job, _needs(job)),
    make=_make,
    # Verification unpacks the model once more.
    foresee=lambda job: Cost(memory=largest_layer(job), disk=candidate_nbytes(job) + treated_nbytes(job)),
    describe=lambda job: f"quantize to {job.recipe.quantize.scheme}",
)
