"""Merge: the planned model written as a stock folder, refitted meanwhile if the recipe says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.alignment.table import AlignmentTable, estimate_memory
from mka.model.checkpoint import Checkpoint, describe_checkpoint, open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.pipeline.foresee import largest_layer, merged_nbytes
from mka.pipeline.job import Job
from mka.pipeline.plan import open_plan
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage
from mka.plan.plan import MergePlan
from mka.recipe import ModelSource
from mka.terminal import show_progress
from mka.transforms import get_transform
from mka.transforms.fold import Folds
from mka.transforms.merge import ALIGNED, FOLDS, check_alignable


def write_merged(
    plan: MergePlan,
    checkpoint: Checkpoint,
    output: Path,
    folds: Folds | None = None,
    alignment: AlignmentTable | None = None,
    source: ModelSource | None = None,
) -> dict[str, Any]:
    """Write the planned model, verify it with a stranger's loader, publish.

    Args:
        plan: what to make.
        checkpoint: the base.
        output: folder to publish.
        folds: what the plan's method fitted.
        alignment: what every layer from the first change on is refitted on; None: nothing is.
        source: precision of the forward passes of a refit; needed with ``alignment``.

    Returns:
        What the loader found, and under "alignment" the facts of the fit, if there was one.

    Raises:
        PlanError: if plan and checkpoint, or plan and folds, do not fit.
        CalibrationError: if there is too little text.
        NumericsError: if a fit is not finite.
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    if alignment is not None:
        assert source is not None
        return _write_aligned(plan, checkpoint, output, alignment, source)
    transform = get_transform("merge")
    with show_progress(transform.summary, transform.foresee(checkpoint, plan), "B", scale=True) as advance:
        return transform.apply(checkpoint, plan, {FOLDS: folds}, output, verify=verify_checkpoint, on_tensor=advance)


def _write_aligned(
    plan: MergePlan, checkpoint: Checkpoint, output: Path, alignment: AlignmentTable, source: ModelSource
) -> dict[str, Any]:
    from mka.alignment.aligner import Aligner
    from mka.model.loading import open_decoder

    check_alignable(plan, aligned=True)
    transform = get_transform("merge")
    transform.check(checkpoint, plan)
    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        aligner = Aligner(decoder, tokenizer, alignment.texts, alignment.settings)
        found, facts = aligner.align(
            plan.layers,
            lambda tensors: transform.apply(checkpoint, plan, {ALIGNED: tensors}, output, verify=verify_checkpoint),
        )
    return found | {"alignment": facts}


def describe_model(folder: Path, loaded: Mapping[str, Any], rounding: str = "") -> dict[str, Any]:
    """Return the facts of a written model: what a user loads counts parameters after unpacking.

    Args:
        folder: where it is; said nowhere, since it moves when it is published.
        loaded: what the loader found.
        rounding: what most of its bytes are, where they are packed integers.
    """
    facts = describe_checkpoint(open_checkpoint(folder, verify=False))
    facts["parameters"] = loaded["parameters"]
    if rounding and facts["dtype"] in ("I32", "I8"):
        facts["dtype"] = rounding
    del facts["path"]
    fit = {"alignment": loaded["alignment"]} if "alignment" in loaded else {}
    made = ("alignment", "rounding")
    return facts | {"loaded": {key: value for key, value in loaded.items() if key not in made}} | fit


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    plan, folds = open_plan(found)
    output = folder / MODEL_FOLDER
    loaded = write_merged(plan, job.base, output, folds, job.inputs.alignment, job.recipe.model)
    return describe_model(output, loaded)


def _read(job: Job, found: Found) -> dict[str, str]:
    aligned = {"alignment": job.inputs.alignment.digest} if job.inputs.alignment else {}
    return {"base": job.base.digest, "plan": found["plan"].digest} | aligned


def _settings(job: Job) -> dict[str, Any]:
    if job.inputs.alignment is None:
        return {}
    from mka.alignment.lockstep import VERSION  # imports torch

    keyed = job.recipe.alignment.model_dump(include={"tokens", "context", "copies", "penalty", "heldout_source"})
    return keyed | {"dtype": job.recipe.model.dtype, "version": VERSION}


def _foresee(job: Job) -> Cost:
    files = ("config.json", "model.safetensors", "README.md", "SHA256SUMS")
    if job.inputs.alignment is None:
        return Cost(memory=largest_layer(job), disk=merged_nbytes(job), files=files)
    memory = estimate_memory(job.inputs.alignment, job.base, job.recipe.model, job.planner.competing)
    return Cost(2 * largest_layer(job) + memory, merged_nbytes(job), (*files, "evidence/alignment.json"))


MERGE = Stage(
    "merge",
    version=4,
    reads=_read,
    settings=_settings,
    make=_make,
    foresee=_foresee,
    describe=lambda job: f"merge {job.base.layers} layers into {job.aim.layers_out}",
)
