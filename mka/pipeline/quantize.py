"""Quantize: the linear layers' weights rounded."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mka.errors import RecipeError
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.pipeline.foresee import candidate_nbytes, estimate_states, largest_layer, merged_nbytes
from mka.pipeline.job import Job
from mka.pipeline.merge import describe_model
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.recipe import QuantizeSettings
from mka.terminal import show_progress
from mka.transforms import BASE, CALIBRATION, get_quantizer


def check_quantizer(checkpoint: Checkpoint, settings: QuantizeSettings, given: Collection[str] = ()) -> None:
    """Refuse what a scheme cannot do, before work begins.

    Args:
        checkpoint: what will be quantized, or the base it will be made of.
        settings: scheme (not "off") and group size.
        given: the kinds of evidence there will be.

    Raises:
        RecipeError: if the group size does not fit, or evidence is missing.
        PlanError: if the layers have parts that the scheme's transform cannot treat.
        CheckpointError: if the weights are quantized already.
    """
    transform = get_quantizer(settings.scheme)
    if missing := sorted(transform.needs - set(given)):
        raise RecipeError(
            f"quantize.scheme {settings.scheme}: {transform.name} looks at {', '.join(missing)}; none given"
        )
    transform.check(checkpoint, settings)


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
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
        MkaError: as `check_quantizer`.
    """
    check_quantizer(checkpoint, settings, evidence)
    transform = get_quantizer(settings.scheme)
    with show_progress(transform.summary, transform.foresee(checkpoint, settings), "B", scale=True) as advance:
        return transform.apply(checkpoint, settings, evidence, output, verify=verify_checkpoint, on_tensor=advance)


def describe_rounding(settings: QuantizeSettings) -> str:
    """Say what rounded weights are stored as, e.g. "int8 in groups of 64"."""
    return f"{settings.scheme} in groups of {settings.group_size}"


def _offer_evidence(job: Job) -> dict[str, Any]:
    """Return what the scheme's transform asks for, of what a job has."""
    recipe = job.recipe
    offered: dict[str, Any] = {BASE: (job.base, recipe.model)}
    if job.inputs.calibration is not None:
        offered[CALIBRATION] = (job.inputs.calibration, recipe.calibration)
    needs = get_quantizer(recipe.quantize.scheme).needs
    return {kind: value for kind, value in offered.items() if kind in needs}


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    settings, output = job.recipe.quantize, folder / MODEL_FOLDER
    source = open_checkpoint(find_model(found).folder / MODEL_FOLDER, verify=False)
    loaded = write_quantized(source, settings, output, _offer_evidence(job))
    return describe_model(output, loaded, describe_rounding(settings))


def _read(job: Job, found: Found) -> dict[str, str]:
    needs, inputs = get_quantizer(job.recipe.quantize.scheme).needs, {"merged": find_model(found).digest}
    if BASE in needs:
        inputs["base"] = job.base.digest
    if CALIBRATION in needs and job.inputs.calibration is not None:
        inputs["calibration"] = job.inputs.calibration.digest
    return inputs


def _settings(job: Job) -> dict[str, Any]:
    keyed: dict[str, Any] = job.recipe.quantize.model_dump()
    if get_quantizer(job.recipe.quantize.scheme).needs:
        keyed |= {"max_tokens": job.recipe.calibration.max_tokens, "dtype": job.recipe.model.dtype}
    return keyed


def _foresee(job: Job) -> Cost:
    # A transform that looks at texts walks them through the layers; verification unpacks the model once more.
    walked = estimate_states(job) if CALIBRATION in get_quantizer(job.recipe.quantize.scheme).needs else 0
    return Cost(memory=largest_layer(job) + walked, disk=candidate_nbytes(job) + merged_nbytes(job))


QUANTIZE = Stage(
    "quantize",
    version=2,
    wanted=lambda job: job.recipe.quantize.scheme != "off",
    reads=_read,
    settings=_settings,
    make=_make,
    foresee=_foresee,
    describe=lambda job: f"quantize to {job.recipe.quantize.scheme}",
)
