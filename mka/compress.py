"""The whole road in one call, with no orchestrator: observe, score, plan, merge, quantize, evaluate, gate, report."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mka import stages
from mka.alignment_table import AlignmentTable, alignment_json
from mka.checkpoint import Checkpoint, describe_checkpoint, open_checkpoint
from mka.errors import GateRefused
from mka.folds import Folds, bind_folds, folds_path, serialise_folds
from mka.gate import GateDecision, decide, recover_tasks
from mka.job import COMPANIONS_NBYTES, EVIDENCE, Job, candidate_nbytes
from mka.measurements import EvalReport
from mka.plan import MergePlan
from mka.progress import is_shown
from mka.recipe import EvaluationSettings, ModelSource, QuantizeSettings
from mka.report import ReportData, write_card, write_report
from mka.speed import compare_checkpoint_speed
from mka.states import LayerScores
from mka.writing import publish


@dataclass(frozen=True)
class Compression:
    """What came of one compression.

    Attributes:
        output: the published folder.
        plan: what was merged.
        base: measurements of the base, or its facts alone.
        candidate: the same of the candidate.
        decision: the gate's; None if nothing was measured.
        seconds: stage -> seconds.
        alignment: facts of the refit; None if there was none.
    """

    output: Path
    plan: MergePlan
    base: EvalReport
    candidate: EvalReport
    decision: GateDecision | None
    seconds: Mapping[str, float]
    alignment: Mapping[str, Any] | None = None


@dataclass
class Clock:
    """Seconds per stage; says each as it ends."""

    say: Callable[[str], Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)
        self.say(f"{name:<22} {self.seconds[name]:7.1f} s")


def compress(job: Job, output: Path, *, command: str, say: Callable[[str], Any]) -> Compression:
    """Compress and publish a stock model folder with its card, and its evidence in a folder inside.

    Published whole or not at all. A candidate that the gate fails is published too, with the verdict in its card;
    `refuse_failed` turns that into an exit code.

    Args:
        job: what `mka.job.prepare` checked.
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
    if stages.needs_hidden_states(recipe.method):
        assert job.calibration is not None
        with clock.stage("observe"):
            states = stages.observe_checkpoint(job.base, job.calibration, recipe.calibration, recipe.model)
        with clock.stage("score"):
            scores = stages.score_layers(recipe.method, job.base, states)
    with clock.stage("plan"):
        plan = stages.plan_layers(
            recipe.method, recipe.target, job.base, scores, job.calibration, recipe.calibration, recipe.model
        )
        folds = stages.fit_folds(recipe.method, plan, job.base, job.calibration, recipe.calibration, recipe.model)
    return bind_folds(plan, folds), scores, folds


def _name_writing(job: Job) -> str:
    parts = ["align"] * (job.alignment is not None) + ["merge"]
    parts += ["quantize"] * (job.recipe.quantize.scheme != "off")
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _measure_both(
    job: Job, made: Checkpoint, facts: Mapping[str, Any], command: str, clock: Clock
) -> tuple[EvalReport, EvalReport, GateDecision | None]:
    before = describe_checkpoint(job.base)
    if not job.measured:
        bare = EvalReport(before, (), (), {}, {}, {})
        return bare, replace(bare, checkpoint=facts), None
    recipe = job.recipe
    alike: Any = (recipe.evaluation, recipe.model, job.heldout)
    with clock.stage("evaluate base"):
        base = measure_checkpoint(job.base, before, *alike, seed=recipe.seed, command=command, speed=False)
    with clock.stage("evaluate candidate"):
        candidate = measure_checkpoint(made, facts, *alike, seed=recipe.seed, command=command, speed=False)
    with clock.stage("compare speed"):
        speeds = compare_checkpoint_speed(
            {"base": job.base.path, "candidate": made.path},
            dtype=recipe.model.dtype,
            new_tokens=recipe.evaluation.new_tokens,
            seed=recipe.seed,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    base, candidate = replace(base, speed=speeds["base"]), replace(candidate, speed=speeds["candidate"])
    return base, candidate, decide(base, candidate, recipe.gate, seed=recipe.seed)


def _write_evidence(job: Job, result: Compression, scores: LayerScores | None, folder: Path, command: str) -> None:
    import yaml

    recipe = job.recipe.model_dump(mode="json")
    evidence = folder / EVIDENCE
    evidence.mkdir()
    (evidence / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    (evidence / "plan.json").write_text(result.plan.to_json(), encoding="utf-8")
    if scores is not None:
        scores.save(evidence / "scores.json")
    if result.alignment is not None and job.alignment is not None:
        written = alignment_json(result.alignment, job.alignment.digest)
        (evidence / "alignment.json").write_text(written, encoding="utf-8")
    if result.decision is not None:
        for name, report in (("base", result.base), ("candidate", result.candidate)):
            (evidence / f"{name}.json").write_text(report.to_json(), encoding="utf-8")
        gate = json.dumps(result.decision.to_dict(), indent=2) + "\n"
        (evidence / "gate.json").write_text(gate, encoding="utf-8")
    data = ReportData(
        recipe=recipe,
        plan=result.plan,
        scores=scores,
        base=result.base,
        candidate=result.candidate,
        gate=result.decision.to_dict() if result.decision else None,
        recoveries=recover_tasks(result.base, result.candidate, seed=job.recipe.seed) if result.decision else (),
        provenance={
            "base_model": job.recipe.model.label,
            "revision": job.revision,
            "digest": job.base.digest,
            "candidate_digest": result.candidate.checkpoint["digest"],
            "calibration_digest": job.calibration.digest if job.calibration else None,
            **({"alignment_digest": job.alignment.digest} if job.alignment else {}),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
        },
        stages=result.seconds,
        alignment=result.alignment,
    )
    write_report(data, evidence)
    # SHA256SUMS covers the model and neither card nor evidence: a card is there to be edited.
    write_card(data, folder)


def refuse_failed(decision: GateDecision | None, where: Path) -> GateRefused | None:
    """Return the refusal of a failed verdict, for the caller to raise once it has shown the result."""
    if decision is None or decision.verdict != "fail":
        return None
    short = "; ".join(
        f"{c.name}: recovery {c.recovery:.3f}, at most {c.upper:.3f}, needed {c.threshold:g}"
        for c in decision.checks
        if c.verdict == "fail"
    )
    return GateRefused(f"the gate failed this candidate ({short}); evidence in {where}")


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
        What a stranger's loader found in the result, see `mka.verification.inspect_checkpoint`; with the facts of the
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
        facts = stages.write_aligned(plan, base, alignment.texts, alignment.settings, source, made)
    else:
        facts = stages.write_merged(plan, base, made, folds)
    if settings.scheme != "off":
        merged, made = made, folder / "quantized"
        fit = {"alignment": facts["alignment"]} if "alignment" in facts else {}
        facts = stages.write_quantized(open_checkpoint(merged, verify=False), settings, made) | fit
        shutil.rmtree(merged)
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()
    return facts


def measure_checkpoint(
    checkpoint: Checkpoint,
    facts: Mapping[str, Any],
    settings: EvaluationSettings,
    source: ModelSource,
    heldout: Mapping[str, Sequence[str]],
    *,
    seed: int,
    command: str,
    speed: bool = True,
) -> EvalReport:
    """Measure one checkpoint from disk.

    Args:
        checkpoint: what to measure.
        facts: of `mka.checkpoint.describe_checkpoint`, for the report.
        settings: tasks, windows, prompts.
        source: precision, and whether the model's own code may run.
        heldout: source -> texts for perplexity.
        seed: draws the items of tasks.
        command: what was typed, for the record.
        speed: time it too; two models are better timed in turns.

    Raises:
        CheckpointError: if it does not load whole.
        NumericsError: if its outputs are not finite.
    """
    from mka.evaluate import evaluate_checkpoint

    return evaluate_checkpoint(
        checkpoint.path,
        settings,
        dtype=source.dtype,
        seed=seed,
        trust_remote_code=source.trust_remote_code,
        heldout=heldout,
        checkpoint_facts=facts,
        command=command,
        progress=is_shown(),
        speed=speed,
    )
