"""Transform: what a recipe's `transforms` list, done one after another to the merged model."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mka.errors import RecipeError
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.pipeline.foresee import largest_layer, list_treated_nbytes
from mka.pipeline.job import Job
from mka.pipeline.merge import describe_model
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.terminal import show_progress
from mka.transforms import BASE, CALIBRATION, Transform, Treatment


def write_transformed(
    treatments: Sequence[Treatment],
    checkpoint: Checkpoint,
    output: Path,
    evidence: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Do one thing after another, verify the last with a stranger's loader, publish; returns what the loader found.

    Each writes a folder, beside the output until the next has read it.

    Args:
        treatments: at least one.
        checkpoint: what the first reads.
        output: folder to publish.
        evidence: kind -> what transforms ask for.

    Raises:
        MkaError: what a transform refuses.
    """
    for place, treatment in enumerate(treatments[:-1], 1):
        aside = output.with_name(f"{output.name}-{place}")
        _apply_treatment(treatment, checkpoint, evidence, aside)
        if place > 1:
            shutil.rmtree(checkpoint.path)
        checkpoint = open_checkpoint(aside, verify=False)
    found = _apply_treatment(treatments[-1], checkpoint, evidence, output, verify=verify_checkpoint)
    if len(treatments) > 1:
        shutil.rmtree(checkpoint.path)
    return found


def _apply_treatment(treatment: Treatment, *given: Any, **options: Any) -> Any:
    asked = f"transforms: {treatment.transform.name}"
    return apply_transform(treatment.transform, treatment.settings, *given, asked=asked, **options)


def check_transform(
    transform: Transform, settings: Any, checkpoint: Checkpoint, given: Collection[str], *, asked: str
) -> None:
    """Refuse what a transform cannot do, before work begins.

    Args:
        transform: what is to be done.
        settings: its own.
        checkpoint: what it will read, or what that will be made of.
        given: the kinds of evidence there will be.
        asked: how the recipe asks for it, for the refusal.

    Raises:
        RecipeError: if evidence is missing.
        MkaError: what the transform refuses.
    """
    if missing := sorted(transform.needs - set(given)):
        raise RecipeError(f"{asked}: {transform.name} looks at {', '.join(missing)}; none given")
    transform.check(checkpoint, settings)


def apply_transform(
    transform: Transform,
    settings: Any,
    checkpoint: Checkpoint,
    evidence: Mapping[str, Any],
    output: Path,
    *,
    asked: str,
    **options: Any,
) -> Any:
    """Check and apply a transform with a progress bar, handing it the evidence it needs and no other.

    Args:
        transform: what is done.
        settings: its own.
        checkpoint: what it reads.
        evidence: kind -> what there is.
        output: folder to publish.
        asked: how the recipe asks for it, for the refusal.
        options: for `mka.transforms.Transform.apply`.

    Raises:
        MkaError: as `check_transform`.
    """
    check_transform(transform, settings, checkpoint, evidence, asked=asked)
    handed = {kind: value for kind, value in evidence.items() if kind in transform.needs}
    with show_progress(transform.summary, transform.foresee(checkpoint, settings), "B", scale=True) as advance:
        return transform.apply(checkpoint, settings, handed, output, on_tensor=advance, **options)


def offer_evidence(job: Job) -> dict[str, Any]:
    """Return what transforms may look at, of what a job has: kind -> evidence."""
    recipe = job.recipe
    offered: dict[str, Any] = {BASE: (job.base, recipe.model)}
    if job.inputs.calibration is not None:
        offered[CALIBRATION] = (job.inputs.calibration, recipe.calibration)
    return offered


def digest_evidence(job: Job, needs: frozenset[str]) -> dict[str, str]:
    """Return the digests of the evidence that is needed, by kind."""
    digests = {BASE: job.base.digest} if BASE in needs else {}
    if CALIBRATION in needs and job.inputs.calibration is not None:
        digests[CALIBRATION] = job.inputs.calibration.digest
    return digests


def key_evidence(job: Job, needs: frozenset[str]) -> dict[str, Any]:
    """Return the settings that decide how evidence is looked at, if any is needed."""
    return {"max_tokens": job.recipe.calibration.max_tokens, "dtype": job.recipe.model.dtype} if needs else {}


def describe_treatments(job: Job) -> str:
    """Say in one line what is done to the merged model; empty if nothing is."""
    return ", ".join(treatment.describe() for treatment in job.treatments)


def _needs(job: Job) -> frozenset[str]:
    return frozenset[str]().union(*(treatment.transform.needs for treatment in job.treatments))


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    source, output = open_checkpoint(find_model(found).open() / MODEL_FOLDER, verify=False), folder / MODEL_FOLDER
    return describe_model(output, write_transformed(job.treatments, source, output, offer_evidence(job)))


TRANSFORM = Stage(
    "transform",
    version=1,
    wanted=lambda job: bool(job.treatments),
    reads=lambda job, found: {"model": find_model(found).digest} | digest_evidence(job, _needs(job)),
    settings=lambda job: (
        {"transforms": [treatment.key for treatment in job.treatments]} | key_evidence(job, _needs(job))
    ),
    make=_make,
    foresee=lambda job: Cost(memory=largest_layer(job), disk=sum(list_treated_nbytes(job))),
    describe=describe_treatments,
)
