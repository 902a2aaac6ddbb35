"""Plan: which layers become one, and what the method folds into the model after a deletion."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mka.errors import PlanError
from mka.evidence.cuts import CutEvidence, find_cuts
from mka.evidence.gather import open_oracles
from mka.evidence.journal import JOURNAL_FILE, Journal, RecalledRepairs
from mka.evidence.needs import REPAIRS, RUNNING, TRIALS, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Planner
from mka.model.checkpoint import Checkpoint
from mka.pipeline.foresee import (
    estimate_search,
    estimate_states,
    head_nbytes,
    largest_layer,
    merged_nbytes,
    width_of,
)
from mka.pipeline.job import Job
from mka.pipeline.score import open_scores
from mka.pipeline.stage import PLAN_FILE, Cost, Found, Stage
from mka.plan.plan import MergePlan
from mka.plan.target import Aim
from mka.recipe import CalibrationSettings, ModelSource
from mka.store.products import find_scratch
from mka.terminal import show_progress
from mka.texts.calibration import CalibrationSet
from mka.transforms.fold import Folds, bind_folds, folds_path, load_folds, require_finite, serialise_folds


def open_planner_oracles(
    planner: Planner,
    checkpoint: Checkpoint,
    calibration: CalibrationSet | None,
    settings: CalibrationSettings,
    source: ModelSource,
    scratch: Path | None = None,
) -> AbstractContextManager[Mapping[str, Any]]:
    """Return what a method looks at while planning, as `mka.evidence.gather.open_oracles` does, to be entered.

    Raises:
        PlanError: if it looks at calibration texts and there is no calibration set.
    """
    needs = planner.needs
    if calibration is None and needs & RUNNING:
        raise PlanError(f"method {planner.name!r} with these settings needs a calibration set; give one")
    texts = calibration.texts if calibration else ()
    return open_oracles(needs, planner.settings, checkpoint, texts, settings, source, scratch)


def plan_layers(
    planner: Planner,
    aim: Aim,
    checkpoint: Checkpoint,
    scores: LayerScores | None,
    source: ModelSource,
    oracles: Mapping[str, Any],
    journal: Path | None = None,
) -> MergePlan:
    """Plan.

    Args:
        planner: who decides.
        aim: the target in layers.
        checkpoint: the base.
        scores: of `mka.pipeline.score.score_layers`.
        source: how the base is called.
        oracles: what `open_planner_oracles` gave; plans for several targets may share them.
        journal: file that keeps what a search has measured, for one that goes on after it was killed; named by
            everything that decides the plan.

    Raises:
        PlanError: if protection and layer kinds leave nothing to merge.
        OutputError: if the journal cannot be written.
    """
    evidence = Evidence(checkpoint.layers, checkpoint.kinds, **oracles)
    if evidence.repairs is not None and journal is not None:
        evidence = replace(evidence, repairs=RecalledRepairs(evidence.repairs, Journal(journal)))
    base = {"model": source.label, "digest": checkpoint.digest, "model_type": checkpoint.family.model_type}
    with show_progress("plan merges", *planner.method.units(checkpoint.layers, aim, planner.settings)) as advance:
        return planner.plan(replace(evidence, on_progress=advance), scores, aim, base)


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
    from mka.model.loading import open_decoder
    from mka.texts.tokens import tokenize

    texts, limit, family = calibration.texts, settings.max_tokens, checkpoint.family
    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        passes = (cuts[-1].deleted[-1] + 1) * sum(map(len, tokenize(tokenizer, texts, limit)))
        with show_progress("fit folds", passes, "tok") as advance:
            options: dict[str, Any] = {"max_tokens": limit, "batch_size": settings.batch_size, "on_layer": advance}
            evidence = CutEvidence(
                family, decoder.is_tied, cuts, lambda: stream_cuts(decoder, tokenizer, texts, cuts, **options)
            )
            folds = dict(method.fit(evidence, plan, planner.settings))
    require_finite(folds)
    # Some checkpoints store the tied head beside the embedding.
    if decoder.is_tied and family.head_tensor in checkpoint.tensors and family.embedding_tensor in folds:
        folds[family.head_tensor] = folds[family.embedding_tensor]
    return folds


def write_plan(plan: MergePlan, folds: Folds | None, path: Path) -> None:
    """Write a plan, and its folds beside it."""
    if folds:
        folds_path(path).write_bytes(serialise_folds(folds))
    path.write_text(plan.to_json(), encoding="utf-8")


def open_plan(found: Found) -> tuple[MergePlan, Folds | None]:
    """Read the plan that was made, and its folds if it needs any."""
    path = found["plan"].open() / PLAN_FILE
    plan = MergePlan.load(path)
    return plan, load_folds(plan, path)


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    planner, looking, source = job.planner, job.recipe.calibration, job.recipe.model
    calibration = job.inputs.calibration
    owner = (planner.name, planner.dump_settings())
    with job.opened.borrow(
        owner, lambda: open_planner_oracles(planner, job.base, calibration, looking, source, folder.parent)
    ) as oracles:
        scores, journal = open_scores(job, found), find_scratch(folder) / JOURNAL_FILE
        plan = plan_layers(planner, job.aim, job.base, scores, source, oracles, journal)
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
    if planner.needs & {TRIALS, REPAIRS}:
        from mka.alignment.lockstep import VERSION  # imports torch

        keyed["alignment_version"] = VERSION
    if REPAIRS in planner.needs and planner.settings.finalists:
        from mka.healing.distil import VERSION as HEALING_VERSION  # imports torch

        keyed["healing_version"] = HEALING_VERSION
    return keyed


def _foresee(job: Job) -> Cost:
    files = ["evidence/plan.json"]
    if job.planner.method.fit and job.aim.layers_out < job.base.layers:
        files.append("evidence/plan.folds.safetensors")
    if not job.planner.reads_texts:
        return Cost(files=tuple(files))
    memory = 2 * largest_layer(job) + estimate_states(job) + head_nbytes(job)
    if REPAIRS in job.planner.needs:
        # A finalist is written while it is healed.
        disk = merged_nbytes(job) if job.planner.settings.finalists else 0
        return Cost(memory + estimate_search(job, job.planner.settings), disk, tuple(files))
    # What enters every layer is kept for the tokens of a search.
    memory += job.base.layers * job.recipe.calibration.search_tokens * job.base.config["hidden_size"] * width_of(job)
    return Cost(memory=memory, files=tuple(files))


PLAN = Stage(
    "plan",
    version=1,
    reads=_read,
    settings=_settings,
    make=_make,
    foresee=_foresee,
    describe=lambda job: f"plan merges by {job.planner.name}",
)
