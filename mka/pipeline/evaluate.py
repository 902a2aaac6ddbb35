"""Evaluate: base, candidate and control measured from disk under equal conditions, then timed in turns."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mka.evaluation.metrics import list_asked
from mka.evaluation.scores import EvalReport
from mka.evaluation.speed import TIMING
from mka.model.checkpoint import Checkpoint, describe_checkpoint, open_checkpoint
from mka.pipeline.control import describe_control, has_control
from mka.pipeline.foresee import estimate_logits, whole_model
from mka.pipeline.inputs import Inputs, hold_tables
from mka.pipeline.job import Job
from mka.pipeline.stage import CONTROL_STAGE, MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.recipe import EvaluationSettings, ModelSource
from mka.store.products import Product
from mka.terminal import is_shown

REPORT_FILE = "evaluation.json"
ROLES = ("base", "candidate", "control")
BASE, CANDIDATE = "evaluate base", "evaluate candidate"


def describe_base(job: Job) -> dict[str, Any]:
    """Return the facts of the base."""
    return describe_checkpoint(job.base)


def describe_candidate(job: Job, found: Found) -> dict[str, Any]:
    """Return the facts of the candidate, with the folder where a person finds it."""
    product = find_model(found)
    return _describe_product(product) | {"path": str(job.output or product.folder / MODEL_FOLDER)}


def describe_made_control(job: Job, found: Found) -> dict[str, Any]:
    """Return the facts of the control, and what was done to its weights."""
    product = found[CONTROL_STAGE]
    made = {"path": str(product.folder / MODEL_FOLDER), "treatment": describe_control(job)}
    return _describe_product(product) | made


def _describe_product(product: Product) -> dict[str, Any]:
    facts = {key: value for key, value in product.facts.items() if key not in ("alignment", "healing", "loaded")}
    if "served_bytes" not in facts:  # it was made before these were counted
        facts["served_bytes"] = open_checkpoint(product.folder / MODEL_FOLDER, verify=False).served_nbytes
    return facts


def measure_checkpoint(
    checkpoint: Checkpoint,
    facts: Mapping[str, Any],
    settings: EvaluationSettings,
    source: ModelSource,
    inputs: Inputs,
    *,
    seed: int,
    command: str,
    speed: bool = False,
    base: Path | None = None,
) -> EvalReport:
    """Measure one checkpoint from disk.

    Args:
        checkpoint: what to measure.
        facts: of `mka.model.checkpoint.describe_checkpoint`, for the report.
        settings: windows, prompts, batches.
        source: precision, and whether the model's own code may run.
        inputs: what it is measured on.
        seed: draws the items of tasks.
        command: what was typed, for the record.
        speed: time it too; two models are better timed in turns.
        base: the base's folder, if this is a candidate; loaded only if a metric holds one against the other.

    Raises:
        CheckpointError: if it does not load whole.
        NumericsError: if its outputs are not finite.
    """
    from mka.evaluation.evaluate import evaluate_checkpoint

    return evaluate_checkpoint(
        checkpoint.path,
        settings.model_copy(
            update={
                "tasks": inputs.tasks,
                "tasks_folder": inputs.catalog.folder,
                "include_path": inputs.catalog.include,
            }
        ),
        dtype=source.dtype,
        seed=seed,
        trust_remote_code=source.trust_remote_code,
        heldout=inputs.heldout,
        checkpoint_facts=facts,
        command=command,
        progress=is_shown(),
        speed=speed,
        base=base,
    )


def evaluate_stage(
    name: str,
    digest: Callable[[Job, Found], str],
    open_model: Callable[[Job, Found], tuple[Checkpoint, Mapping[str, Any]]],
    *,
    held_against_base: bool = False,
) -> Stage:
    """Return the stage that measures one checkpoint.

    Args:
        name: of the stage; results are stored under "evaluate" whatever it is.
        digest: of the checkpoint.
        open_model: the checkpoint and its facts; called only if it has not been measured.
        held_against_base: whether metrics that are a distance from the base are measured too.
    """

    def make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
        recipe = job.recipe
        alike: Any = (recipe.evaluation, recipe.model, job.inputs)
        against = job.base.path if held_against_base else None
        model = open_model(job, found)
        with hold_tables(job.inputs, recipe.evaluation.shots):
            report = measure_checkpoint(*model, *alike, seed=recipe.seed, command=job.command, base=against)
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        return {"scores": {f"{s.name} {s.metric}": s.value for s in report.scores}}

    def read(job: Job, found: Found) -> dict[str, str]:
        inputs = {**job.inputs.digests, "checkpoint": digest(job, found)}
        if held_against_base and not all(metric.of_base for metric in list_asked(job.recipe.evaluation)):
            inputs["base"] = job.base.digest
        return inputs

    def settings(job: Job) -> dict[str, Any]:
        keyed = job.recipe.evaluation.model_dump(
            mode="json", exclude={"text", "tasks_folder", "include_path", "overlap_index"}
        )
        return keyed | {"seed": job.recipe.seed, "dtype": job.recipe.model.dtype}

    return Stage(
        name,
        version=1,
        stored="evaluate",
        wanted=lambda job: job.measured,
        reads=read,
        settings=settings,
        make=make,
        foresee=lambda job: Cost(
            memory=whole_model(job) + estimate_logits(job), files=(f"evidence/{name.split()[-1]}.json",)
        ),
    )


EVALUATE_BASE = evaluate_stage(
    BASE, lambda job, found: job.base.digest, lambda job, found: (job.base, describe_base(job))
)
EVALUATE = evaluate_stage(
    CANDIDATE,
    lambda job, found: find_model(found).facts["digest"],
    lambda job, found: (
        open_checkpoint(find_model(found).open() / MODEL_FOLDER, verify=False),
        describe_candidate(job, found),
    ),
    held_against_base=True,
)
EVALUATE_CONTROL = replace(
    evaluate_stage(
        "evaluate control",
        lambda job, found: found[CONTROL_STAGE].facts["digest"],
        lambda job, found: (
            open_checkpoint(found[CONTROL_STAGE].open() / MODEL_FOLDER, verify=False),
            describe_made_control(job, found),
        ),
        held_against_base=True,
    ),
    wanted=has_control,
)


def speed_stage(digest: str | None = None, folder: Path | None = None) -> Stage:
    """Return the stage that times base, candidate and control, if there is one, in turns.

    Args:
        digest: of the candidate; None: of the last model made.
        folder: where it is.
    """

    def settings(job: Job) -> dict[str, Any]:
        recipe = job.recipe
        return {"dtype": recipe.model.dtype, "new_tokens": recipe.evaluation.new_tokens, "seed": recipe.seed}

    def make(job: Job, found: Found, _: Path) -> Mapping[str, Any]:
        from mka.evaluation.speed import compare_checkpoint_speed

        folders = {"base": job.base.path, "candidate": folder or find_model(found).open() / MODEL_FOLDER}
        if CONTROL_STAGE in found:
            folders["control"] = found[CONTROL_STAGE].open() / MODEL_FOLDER
        code = job.recipe.model.trust_remote_code
        timing = compare_checkpoint_speed(folders, trust_remote_code=code, **settings(job))
        return timing.rates | {TIMING: timing.conditions}

    def read(job: Job, found: Found) -> dict[str, str]:
        timed = {"base": job.base.digest, "candidate": digest or find_model(found).facts["digest"]}
        return timed | ({"control": found[CONTROL_STAGE].facts["digest"]} if CONTROL_STAGE in found else {})

    return Stage(
        "compare speed",
        version=2,
        stored="speed",
        wanted=lambda job: job.measured,
        reads=read,
        settings=settings,
        make=make,
        foresee=lambda job: Cost(memory=(3 if has_control(job) else 2) * whole_model(job)),
    )


SPEED = speed_stage()


def open_report(found: Found, role: str) -> EvalReport:
    """Read what was measured of "base", "candidate" or "control", with its speed if that was timed.

    Where there is no control of its own, it is the base.
    """
    if role == "control" and EVALUATE_CONTROL.name not in found:
        role = "base"
    report = EvalReport.load(found[f"evaluate {role}"].open() / REPORT_FILE)
    if SPEED.name not in found:
        return report
    timed = found[SPEED.name].facts
    return replace(report, speed=timed[role], conditions={**report.conditions, TIMING: timed[TIMING]})


def open_reports(job: Job, found: Found) -> tuple[EvalReport, EvalReport, EvalReport | None]:
    """Read base, candidate and control with their speeds; where nothing was measured, facts alone and no control.

    Measurements are stored by content: whoever made one may have found the model in another place.
    """
    facts = {"base": describe_base(job), "candidate": describe_candidate(job, found)}
    if BASE not in found:
        bare = EvalReport(facts["base"], (), {}, {}, {})
        return bare, replace(bare, checkpoint=facts["candidate"]), None
    facts["control"] = describe_made_control(job, found) if EVALUATE_CONTROL.name in found else facts["base"]
    base, candidate, control = (replace(open_report(found, role), checkpoint=facts[role]) for role in ROLES)
    return base, candidate, control
