"""Base and candidate measured from disk under equal conditions; then the gate."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.calibration import read_heldout
from mka.checkpoint import describe_checkpoint, open_checkpoint
from mka.gate import GateDecision, decide
from mka.measurements import EvalReport
from mka.products import Product, produce
from mka.recipe import GateSettings
from tasks import suites, tables
from tasks.compression import Job
from tasks.versioned import table_name

VERSION = 1
REPORT_FILE = "evaluation.json"


@task(task_run_name="evaluate {role}", cache_policy=NO_CACHE)
def evaluate(job: Job, role: str, facts: Mapping[str, Any], fetch: Callable[[], Path] | None = None) -> Product:
    """Measure one checkpoint from disk.

    Args:
        job: the run.
        role: "base", "candidate" or "champion".
        facts: path, digest, layers, parameters, bytes of the checkpoint; its digest alone, if ``fetch`` is given.
        fetch: brings the checkpoint here; called only if its measurement is not stored.

    Raises:
        CheckpointError: if it does not load whole.
        NumericsError: if its outputs are not finite.
    """
    from mka.evaluate import evaluate_checkpoint

    recipe = job.recipe
    settings = recipe.evaluation

    def make(folder: Path) -> Mapping[str, Any]:
        text = settings.text
        tasks_folder = settings.tasks_folder
        found = describe_checkpoint(open_checkpoint(fetch(), verify=False)) if fetch else facts
        report = evaluate_checkpoint(
            found["path"],
            settings.model_copy(
                update={"tasks_folder": job.tables.folder / table_name(tasks_folder) if tasks_folder else None}
            ),
            dtype=recipe.model.dtype,
            seed=recipe.seed,
            trust_remote_code=recipe.model.trust_remote_code,
            heldout=read_heldout(job.tables.folder / table_name(text)) if text else {},
            checkpoint_facts=found,
            command=job.command,
            speed=False,
        )
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        return {"scores": {f"{s.name} {s.metric}": s.value for s in (*report.text, *report.tasks)}}

    used = [p for p in (settings.text, settings.tasks_folder if settings.tasks else None) if p is not None]
    inputs = {table_name(p): job.versions[str(p)].digest for p in used} | {"checkpoint": facts["digest"]}
    keyed = settings.model_dump(mode="json", exclude={"text", "tasks_folder", "overlap_index"})
    keyed |= {"seed": recipe.seed, "dtype": recipe.model.dtype}
    return produce(job.place.stages, "evaluate", version=VERSION, settings=keyed, inputs=inputs, make=make)


@task(task_run_name="compare speed", cache_policy=NO_CACHE)
def compare_speeds(job: Job, candidate: Mapping[str, Any]) -> Product:
    """Time base and candidate in turns on this machine.

    Raises:
        CheckpointError: if one does not load whole.
    """
    from mka.speed import compare_checkpoint_speed

    recipe = job.recipe
    settings: dict[str, Any] = {
        "dtype": recipe.model.dtype,
        "new_tokens": recipe.evaluation.new_tokens,
        "seed": recipe.seed,
    }

    def make(folder: Path) -> Mapping[str, Any]:
        folders = {"base": job.base["path"], "candidate": candidate["path"]}
        return compare_checkpoint_speed(folders, trust_remote_code=recipe.model.trust_remote_code, **settings)

    inputs = {"base": job.base["digest"], "candidate": candidate["digest"]}
    return produce(job.place.stages, "speed", version=VERSION, settings=settings, inputs=inputs, make=make)


@task(task_run_name="gate", cache_policy=NO_CACHE)
def decide_gate(job: Job, base: Product, candidate: Product, thresholds: GateSettings | None = None) -> Product:
    """Guard both reports and decide whether the candidate keeps enough of its base.

    Args:
        job: the run.
        base: measurement of the base, or of whatever else the candidate is held against.
        candidate: measurement of the candidate.
        thresholds: default: those of the recipe.

    Raises:
        GuardError: if the reports break an expectation or were not measured alike.
    """
    thresholds = thresholds or job.recipe.gate

    def make(folder: Path) -> Mapping[str, Any]:
        before, after = open_report(base), open_report(candidate)
        job.guard("evaluation_report", tables.evaluation_report_table(before, after), suites.evaluation_report())
        decision: GateDecision = decide(before, after, thresholds, seed=job.recipe.seed)
        return decision.to_dict() | {"lines": decision.describe()}

    keyed = thresholds.model_dump(exclude={"champion_recovery"}) | {"seed": job.recipe.seed}
    inputs = {"base": base.digest, "candidate": candidate.digest}
    return produce(job.place.stages, "gate", version=VERSION, settings=keyed, inputs=inputs, make=make)


def open_report(product: Product, speeds: Product | None = None, role: str = "") -> EvalReport:
    """Read an evaluation stage's result, with the speed that was measured in turns with the other model's."""
    report = EvalReport.load(product.folder / REPORT_FILE)
    return report if speeds is None else replace(report, speed=speeds.facts[role])
