"""Plan: which layers become one, and what the method folds into the model after a deletion."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mka.errors import PlanError
from mka.evidence.cuts import CutEvidence, find_cuts
from mka.evidence.gather import open_oracles
from mka.evidence.needs import REOBSERVE, TRIALS, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Planner
from mka.model.checkpoint import Checkpoint
from mka.pipeline.foresee import estimate_states, largest_layer, whole_model
from mka.pipeline.job import Job
from mka.pipeline.score import open_scores
from mka.pipeline.stage import PLAN_FILE, Cost, Found, Stage
from mka.plan.plan import MergePlan
from mka.plan.target import Aim
from mka.recipe import CalibrationSettings, ModelSource
from mka.terminal import show_progress
from mka.texts.calibration import CalibrationSet
from mka.transforms.fold import Folds, bind_folds, folds_path, load_folds, require_finite, serialise_folds


def plan_layers(
    planner: Planner,
    aim: Aim,
    checkpoint: Checkpoint,
    scores: LayerScores | None,
    source: ModelSource,
    oracles: Mapping[str, Any],
) -> MergePlan:
    """Plan.

    Args:
        planner: who decides.
        aim: the target in layers.
        checkpoint: the base.
        scores: of `mka.pipeline.score.score_layers`.
        source: how the base is called.
        oracles: of `mka.evidence.gather.open_oracles`; plans for several targets may share them.

    Raises:
        PlanError: if protection and layer kinds leave nothing to merge.
    """
    evidence = Evidence(checkpoint.layers, checkpoint.kinds, **oracles)
    with show_progress("plan merges", *planner.method.units(checkpoint.layers, aim, planner.settings)) as advance:
        plan = planner.method.plan(replace(evidence, on_progress=advance), scores, aim, planner.settings)
    base = {"model": source.label, "digest": checkpoint.digest, "model_type": checkpoint.family.model_type}
    return replace(plan, base=base)


def fit_folds(
    planner: Planner,
    plan: MergePlan,
    checkpoint: Checkpoint,
    calibration: CalibrationSet | None,
    settings: CalibrationSettings,
    source: ModelSource,
) -> Folds | None:
    """Fit what a method folds into the model after a deletion; None if it fits nothing, or nothing was deleted.

    Raises:
        PlanError: if there is no calibration set to fit on.
        NumericsError: if the fit is singular or not finite.
    """
    method = planner.method
    cuts = find_cuts(plan) if method.fit else ()
    if method.fit is None or not cuts:
        return None
    if calibration is None:
        raise PlanError(f"method {planner.name!r} is fitted on calibration texts; give a calibration set")
    from mka.evidence.residuals import stream_cuts
    from mka.model.loading import load_model
    from mka.texts.tokens import tokenize

    model, tokenizer = load_model(checkpoint.path, source.dtype, source.trust_remote_code)
    texts, limit = calibration.texts, settings.max_tokens
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with show_progress("fit folds", sum(map(len, tokenize(tokenizer, texts, limit))), "tok") as advance:
        options: dict[str, Any] = {"max_tokens": limit, "batch_size": settings.batch_size, "on_batch": advance}
        evidence = CutEvidence(
            checkpoint.family, tied, cuts, lambda: stream_cuts(model, tokenizer, texts, cuts, **options)
        )
        folds = dict(method.fit(evidence, plan, planner.settings))
    require_finite(folds)
    # Some checkpoints store the tied head beside the embedding.
    if tied and "lm_head.weight" in checkpoint.tensors and "model.embed_tokens.weight" in folds:
        folds["lm_head.weight"] = folds["model.embed_tokens.weight"]
    return folds


def write_plan(plan: MergePlan, folds: Folds | None, path: Path) -> None:
    """Write a plan, and its folds beside it."""
    if folds:
        folds_path(path).write_bytes(serialise_folds(folds))
    path.write_text(plan.to_json(), encoding="utf-8")


def open_plan(found: Found) -> tuple[MergePlan, Folds | None]:
    """Read the plan that was made, and its folds if it needs any."""
    path = found["plan"].folder / PLAN_FILE
    plan = MergePlan.load(path)
    return plan, load_folds(plan, path)


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    planner, looking, source = job.planner, job.recipe.calibration, job.recipe.model
    calibration = job.inputs.calibration
    oracles = job.opened.open(
        (planner.name, planner.dump_settings()),
        lambda: open_oracles(planner.name, planner.needs, planner.settings, job.base, calibration, looking, source),
    )
    plan = plan_layers(planner, job.aim, job.base, open_scores(found), source, oracles)
    folds = fit_folds(planner, plan, job.base, calibration, looking, source)
    write_plan(bind_folds(plan, folds), folds, folder / PLAN_FILE)
    return {"layers_in": plan.layers_in, "layers_out": plan.layers_out, "layer_ratio": plan.layer_ratio}


def _read(job: Job, found: Found) -> dict[str, str]:
    inputs = {"base": job.base.digest}
    if "score" in found:
        inputs["scores"] = found["score"].digest
    if job.planner.reads_texts and job.inputs.calibration is not None:
        inputs["calibration"] = job.inputs.calibration.digest
    return inputs


def _settings(job: Job) -> dict[str, Any]:
    planner, aim = job.planner, job.aim
    keyed: dict[str, Any] = {"method": planner.name, "settings": planner.dump_settings(), "aim": vars(aim)}
    if planner.reads_texts:
        keyed |= job.recipe.calibration.model_dump(include={"max_tokens", "pooling", "search_tokens"})
        keyed |= {"dtype": job.recipe.model.dtype}
    if TRIALS in planner.needs:
        from mka.alignment.lockstep import VERSION  # imports torch

        keyed["alignment_version"] = VERSION
    return keyed


def _foresee(job: Job) -> Cost:
    files = ["evidence/plan.json"]
    if job.planner.method.fit and job.aim.layers_out < job.base.layers:
        files.append("evidence/plan.folds.safetensors")
    if not job.planner.reads_texts:
        return Cost(memory=largest_layer(job), files=tuple(files))
    copies = 2 if REOBSERVE in job.planner.needs else 1
    return Cost(memory=copies * whole_model(job) + estimate_states(job), files=tuple(files))


PLAN = Stage(
    "plan",
    version=1,
    reads=_read,
    settings=_settings,
    make=_make,
    foresee=_foresee,
    describe=lambda job: f"plan merges by {job.planner.name}",
)
