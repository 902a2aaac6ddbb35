"""The pipeline, told once: the command line, the flow and a cell of the comparison all walk this tuple."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.pipeline.control import CONTROL, describe_control, has_control
from mka.pipeline.evaluate import EVALUATE, EVALUATE_BASE, EVALUATE_CONTROL, SPEED
from mka.pipeline.foresee import (
    COMPANIONS_NBYTES,
    candidate_nbytes,
    count_tokens,
    estimate_writing,
    list_control_nbytes,
)
from mka.pipeline.heal import HEAL
from mka.pipeline.job import Job
from mka.pipeline.judge import GATE
from mka.pipeline.merge import MERGE
from mka.pipeline.observe import OBSERVE
from mka.pipeline.plan import PLAN
from mka.pipeline.quantize import QUANTIZE
from mka.pipeline.report import REPORT
from mka.pipeline.score import SCORE
from mka.pipeline.serve import SERVE
from mka.pipeline.stage import RunStage, Tell
from mka.pipeline.target import expect_gains
from mka.pipeline.transform import TRANSFORM, describe_treatments
from mka.store.products import Product
from mka.transforms import outline_treated

_MAKE = (OBSERVE, SCORE, PLAN, MERGE, HEAL, TRANSFORM, QUANTIZE)
_PROVE = (CONTROL, EVALUATE_BASE, EVALUATE, EVALUATE_CONTROL, SPEED, SERVE, GATE, REPORT)
PIPELINE = (*_MAKE, *_PROVE)


def run(
    job: Job,
    run_stage: RunStage,
    until: str | None = None,
    start: Mapping[str, Product] | None = None,
    tell: Tell = lambda name, product: None,
) -> dict[str, Product]:
    """Walk the stages that a job has.

    Args:
        job: what is done.
        run_stage: returns the product of one stage, e.g. `mka.pipeline.stage.Stage.produce` with a store.
        until: name of the last stage; None: all of them.
        start: products that were there before, by name; what they hold is evidence like that of any stage.
        tell: called with name and result of each stage as soon as it has ended.

    Returns:
        Stage -> product, in their order.

    Raises:
        MkaError: whatever a stage refuses.
    """
    found = dict(start or {})
    for stage in PIPELINE:
        if stage.wanted(job):
            found[stage.name] = run_stage(stage, job, found)
            tell(stage.name, found[stage.name])
        if stage.name == until:
            break
    return found


def foresee(job: Job, output: Path) -> dict[str, Any]:
    """Say what a compression would do, from facts and arithmetic alone.

    Returns:
        base, candidate and control (layers, parameters, bytes; what the candidate gains by arithmetic), tokens to
        write, to observe, to align and to heal on, memory of the stage that needs most and disk of all of them in
        bytes, and the files that would be published.
    """
    from mka.model.checkpoint import describe_checkpoint

    recipe, facts = job.recipe, describe_checkpoint(job.base)
    costs = {stage.name: stage.foresee(job) for stage in PIPELINE if stage.wanted(job)}
    share = sum(job.base.layer_nbytes) / facts["bytes"]
    return {
        "base": {key: facts[key] for key in ("path", "model_type", "layers", "parameters", "bytes", "dtype")},
        "candidate": {
            "layers": job.aim.layers_out,
            "parameters": round(facts["parameters"] * (1 - share * (1 - job.aim.layers_out / job.base.layers))),
            "bytes": candidate_nbytes(job),
            "quantize": recipe.quantize.scheme,
            **expect_gains(outline_treated(job.base, job.treatments)[-1], recipe.quantize, job.aim.layers_out),
        },
        "control": _foresee_control(job),
        "transforms": describe_treatments(job),
        "method": recipe.method.model_dump(),
        "calibration_texts": len(job.inputs.calibration.texts) if job.inputs.calibration else 0,
        "calibration_tokens": sum(count_tokens(job)),
        "alignment": _foresee_alignment(job),
        "healing": _foresee_healing(job),
        "to_write": _foresee_writing(job),
        "evaluated": job.measured,
        "memory_bytes": max(estimate_writing(job), *(cost.memory for cost in costs.values())),
        "disk_bytes": sum(cost.disk for cost in costs.values()) + candidate_nbytes(job) + COMPANIONS_NBYTES,
        "files": list(dict.fromkeys(str(output / name) for cost in costs.values() for name in cost.files)),
        "stages": {name: {"memory_bytes": cost.memory, "disk_bytes": cost.disk} for name, cost in costs.items()},
    }


def _foresee_control(job: Job) -> dict[str, Any] | None:
    if not has_control(job):
        return None
    return {"treatment": describe_control(job), "layers": job.base.layers, "bytes": list_control_nbytes(job)[-1]}


def _foresee_alignment(job: Job) -> dict[str, Any] | None:
    table = job.inputs.alignment
    if table is None:
        return None
    from mka.alignment.table import estimate_memory

    memory = estimate_memory(table, job.base, job.recipe.model, job.planner.competing)
    return {"tokens": table.tokens, "windows": dict(table.windows), "memory_bytes": memory}


def _foresee_healing(job: Job) -> dict[str, Any] | None:
    table, settings = job.inputs.healing, job.recipe.heal
    if table is None:
        return None
    trained = len(table.texts) - 1  # one source only measures
    memory = HEAL.foresee(job).memory
    return {"mode": settings.mode, "tokens": settings.tokens, "sources": trained, "memory_bytes": memory}


def _foresee_writing(job: Job) -> dict[str, Any] | None:
    text = job.inputs.own_text
    return {name: text.facts[name] for name in ("tokens", "texts", "seed")} if text and text.foreseen else None
