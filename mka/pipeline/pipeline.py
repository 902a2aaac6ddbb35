"""The whole road in one call, with no orchestrator: observe, score, plan, merge, quantize, evaluate, gate, report."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mka.alignment.table import AlignmentTable
from mka.evidence.states import LayerScores
from mka.model.checkpoint import Checkpoint, describe_checkpoint, open_checkpoint
from mka.pipeline.evaluate import _measure_both
from mka.pipeline.foresee import COMPANIONS_NBYTES, candidate_nbytes
from mka.pipeline.job import EVIDENCE, Job
from mka.pipeline.merge import write_aligned, write_merged
from mka.pipeline.observe import needs_hidden_states, observe_checkpoint
from mka.pipeline.plan import fit_folds, plan_layers
from mka.pipeline.quantize import write_quantized
from mka.pipeline.report import _write_evidence
from mka.pipeline.score import score_layers
from mka.pipeline.stage import Clock, Compression
from mka.plan.plan import MergePlan
from mka.recipe import ModelSource, QuantizeSettings
from mka.store.publishing import publish
from mka.transforms.fold import Folds, bind_folds, folds_path, serialise_folds


def compress(job: Job, output: Path, *, command: str, say: Callable[[str], Any]) -> Compression:
    """Compress and publish a stock model folder with its card, and its evidence in a folder inside.

    Published whole or not at all. A candidate that the gate fails is published too, with the verdict in its card;
    `refuse_failed` turns that into an exit code.

    Args:
        job: what `mka.pipeline.job.prepare` checked.
        output: folder to publish; must not exist.
        command: what was typed, for the record.
        say: called with a line per finished stage.

    Raises:
        MkaError: if any stage refuses; nothing is published then.
    """
    recipe, clock = job.recipe, Clock(say)
    with publish(output, needed_bytes=candidate_nbytes(job) + COMPANIONS_NBYTES) as partial:
        plan, scores, folds = _decide_plan(job, clock)
        with clock.stage(_name_writing(job)):
            found = write_candidate(plan, job.base, recipe.quantize, partial, folds, job.alignment, recipe.model)
        made = open_checkpoint(partial, verify=False)
        facts = describe_checkpoint(made) | {"path": str(output), "parameters": found["parameters"]}
        base, candidate, decision = _measure_both(job, made, facts, command, clock)
        result = Compression(output, plan, base, candidate, decision, clock.seconds, found.get("alignment"))
        _write_evidence(job, result, scores, partial, command)
        if folds:
            folds_path(partial / EVIDENCE / "plan.json").write_bytes(serialise_folds(folds))
    return result


def _decide_plan(job: Job, clock: Clock) -> tuple[MergePlan, LayerScores | None, Folds | None]:
    recipe, scores = job.recipe, None
    if needs_hidden_states(recipe.method):
        assert job.calibration is not None
        with clock.stage("observe"):
            states = observe_checkpoint(job.base, job.calibration, recipe.calibration, recipe.model)
        with clock.stage("score"):
            scores = score_layers(recipe.method, job.base, states)
    with clock.stage("plan"):
        plan = plan_layers(
            recipe.method, recipe.target, job.base, scores, job.calibration, recipe.calibration, recipe.model
        )
        folds = fit_folds(recipe.method, plan, job.base, job.calibration, recipe.calibration, recipe.model)
    return bind_folds(plan, folds), scores, folds


def _name_writing(job: Job) -> str:
    parts = ["align"] * (job.alignment is not None) + ["merge"]
    parts += ["quantize"] * (job.recipe.quantize.scheme != "off")
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def write_candidate(
    plan: MergePlan,
    base: Checkpoint,
    settings: QuantizeSettings,
    folder: Path,
    folds: Folds | None = None,
    alignment: AlignmentTable | None = None,
    source: ModelSource | None = None,
) -> dict[str, Any]:
    """Merge and, if asked for, align and quantize into an existing folder; the unquantized copy does not stay.

    Args:
        plan: what to make.
        base: the base checkpoint.
        settings: of quantization.
        folder: where the files go.
        folds: what the plan's method fitted.
        alignment: what to refit on.
        source: precision of the forward passes of a refit; needed with ``alignment``.

    Returns:
        What a stranger's loader found in the result, see `mka.model.verification`; with the facts of the
        fit under ``"alignment"`` if there was one.

    Raises:
        PlanError: if plan and checkpoint, or plan and folds, do not fit.
        NumericsError: if a fit is not finite.
        CheckpointError: if what was written does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    made = folder / "merged"
    if alignment is not None:
        assert source is not None
        facts = write_aligned(plan, base, alignment.texts, alignment.settings, source, made)
    else:
        facts = write_merged(plan, base, made, folds)
    if settings.scheme != "off":
        merged, made = made, folder / "quantized"
        fit = {"alignment": facts["alignment"]} if "alignment" in facts else {}
        facts = write_quantized(open_checkpoint(merged, verify=False), settings, made) | fit
        shutil.rmtree(merged)
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()
    return facts
