"""Heal: the merged model trained back towards its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.model.checkpoint import open_checkpoint
from mka.pipeline.foresee import estimate_distillation, largest_layer, merged_nbytes, student_nbytes
from mka.pipeline.job import Job
from mka.pipeline.merge import describe_model
from mka.pipeline.plan import open_plan
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.store.products import find_scratch


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    from mka.alignment.lockstep import find_ends
    from mka.healing.heal import heal_checkpoint

    assert job.inputs.healing is not None
    recipe, output = job.recipe, folder / MODEL_FOLDER
    student = open_checkpoint(find_model(found).open() / MODEL_FOLDER, verify=False)
    ends = find_ends(open_plan(found)[0].layers, job.base.layers)
    pair = (job.base, student, ends, job.inputs.healing, recipe.heal, recipe.model)
    loaded, facts = heal_checkpoint(*pair, output, find_scratch(folder), seed=recipe.seed)
    return describe_model(output, loaded) | {"healing": facts}


def _read(job: Job, found: Found) -> dict[str, str]:
    table = {"texts": job.inputs.healing.digest} if job.inputs.healing else {}
    return {"model": find_model(found).facts["digest"], "base": job.base.digest, "plan": found["plan"].digest} | table


def _settings(job: Job) -> dict[str, Any]:
    from mka.healing.heal import key_healing  # imports torch

    return key_healing(job.recipe.heal, job.recipe.model.dtype, job.recipe.seed)


def _foresee(job: Job) -> Cost:
    settings, files = job.recipe.heal, ("evidence/healing.json",)
    if settings.mode == "local":
        from mka.healing.local import estimate_memory

        memory = estimate_memory(settings.tokens + settings.heldout_tokens, job.base, job.recipe.model.dtype)
        return Cost(2 * largest_layer(job) + memory, merged_nbytes(job), files)
    rows = max(256, round(settings.positions * settings.batch * settings.context))
    disk = merged_nbytes(job) + 2 * 3 * student_nbytes(job)
    return Cost(memory=estimate_distillation(job, rows), disk=disk, files=files)


HEAL = Stage(
    "heal",
    version=1,
    wanted=lambda job: job.recipe.heal.mode != "off",
    reads=_read,
    settings=_settings,
    make=_make,
    foresee=_foresee,
    describe=lambda job: f"heal on {job.recipe.heal.tokens:,} tokens",
)
