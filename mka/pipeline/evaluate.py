"""Evaluation stages."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mka.evaluation.gate import GateDecision, decide
from mka.evaluation.scores import EvalReport
from mka.evaluation.speed import compare_checkpoint_speed
from mka.model.checkpoint import Checkpoint, describe_checkpoint
from mka.pipeline.job import Job
from mka.pipeline.stage import Clock
from mka.recipe import EvaluationSettings, ModelSource
from mka.terminal import is_shown


def _measure_both(
    job: Job, made: Checkpoint, facts: Mapping[str, Any], command: str, clock: Clock
) -> tuple[EvalReport, EvalReport, GateDecision | None]:
    before = describe_checkpoint(job.base)
    if not job.measured:
        bare = EvalReport(before, (), {}, {}, {})
        return bare, replace(bare, checkpoint=facts), None
    recipe = job.recipe
    alike: Any = (recipe.evaluation, recipe.model, job.heldout)
    with clock.stage("evaluate base"):
        base = measure_checkpoint(job.base, before, *alike, seed=recipe.seed, command=command, speed=False)
    with clock.stage("evaluate candidate"):
        candidate = measure_checkpoint(
            made, facts, *alike, seed=recipe.seed, command=command, speed=False, base=job.base.path
        )
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
    base: Path | None = None,
) -> EvalReport:
    """Measure one checkpoint from disk.

    Args:
        checkpoint: what to measure.
        facts: of `mka.model.checkpoint.describe_checkpoint`, for the report.
        settings: tasks, windows, prompts.
        source: precision, and whether the model's own code may run.
        heldout: source -> held-out texts.
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
        settings,
        dtype=source.dtype,
        seed=seed,
        trust_remote_code=source.trust_remote_code,
        heldout=heldout,
        checkpoint_facts=facts,
        command=command,
        progress=is_shown(),
        speed=speed,
        base=base,
    )
