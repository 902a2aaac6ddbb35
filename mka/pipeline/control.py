"""Control: what rounding alone leaves of the base, all its layers kept; what a candidate has to be better than."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.model.checkpoint import open_checkpoint
from mka.pipeline.foresee import list_control_nbytes
from mka.pipeline.job import Job
from mka.pipeline.merge import describe_model
from mka.pipeline.quantize import describe_rounding, estimate_rounding, key_rounding, write_quantized
from mka.pipeline.stage import CONTROL_STAGE, MODEL_FOLDER, Cost, Found, Stage
from mka.pipeline.transform import (
    describe_treatments,
    digest_evidence,
    key_evidence,
    offer_evidence,
    write_transformed,
)
from mka.recipe import QuantizeSettings
from mka.transforms import list_needs, looks_at_texts, outline_treated
from mka.transforms.packing import raise_bytes


def has_control(job: Job) -> bool:
    """Whether a job measures a control of its own; where nothing is done to the weights, it is the base."""
    return job.measured and job.recipe.treats_weights


def choose_rounding(job: Job) -> QuantizeSettings:
    """Return how all layers are rounded: like the candidate's, in as few bytes as they take if it has fewer."""
    return raise_bytes(outline_treated(job.base, job.treatments)[-1], job.recipe.quantize)


def describe_control(job: Job) -> str:
    """Say what is done to all layers, e.g. "int8 in groups of 64"."""
    settings = choose_rounding(job)
    rounding = "" if settings.scheme == "off" else describe_rounding(settings)
    return ", ".join(filter(None, (describe_treatments(job), rounding)))


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    settings, output, evidence = choose_rounding(job), folder / MODEL_FOLDER, offer_evidence(job)
    if settings.scheme == "off":
        return describe_model(output, write_transformed(job.treatments, job.base, output, evidence))
    source, aside = job.base, folder / f"{MODEL_FOLDER}-transformed"
    if job.treatments:
        write_transformed(job.treatments, source, aside, evidence)
        source = open_checkpoint(aside, verify=False)
    loaded = write_quantized(source, settings, output, evidence)
    shutil.rmtree(aside, ignore_errors=True)
    return describe_model(output, loaded, describe_rounding(settings))


def _settings(job: Job) -> dict[str, Any]:
    keyed = {
        "transforms": [treatment.key for treatment in job.treatments],
        "quantize": key_rounding(choose_rounding(job)),
    }
    return keyed | key_evidence(job, list_needs(job.recipe))


def _foresee(job: Job) -> Cost:
    sizes = list_control_nbytes(job)
    return Cost(
        memory=estimate_rounding(job), disk=sum(sizes) + (sizes[-1] if looks_at_texts(job.recipe.quantize) else 0)
    )


# Neither plan nor method is in its key: every run with the same base and rounding shares it.
CONTROL = Stage(
    CONTROL_STAGE,
    version=3,
    wanted=has_control,
    reads=lambda job, found: {"base": job.base.digest} | digest_evidence(job, list_needs(job.recipe)),
    settings=_settings,
    make=_make,
    foresee=_foresee,
    describe=lambda job: f"control: {describe_control(job)}, all {job.base.layers} layers",
)
