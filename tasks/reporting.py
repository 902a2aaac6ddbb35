"""The page and the card, and the code version they are about."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.alignment.table import alignment_json
from mka.evaluation.gate import recover_tasks
from mka.evaluation.scores import EvalReport
from mka.recipe import Recipe
from mka.report.data import ReportData
from mka.report.page import write_card, write_report
from mka.report.pictures import draw_plan, draw_similarity
from mka.store.products import Product, produce
from tasks.stages import MODEL_FOLDER, Job, open_plan, open_report, open_scores

VERSION = 1


@dataclass(frozen=True)
class Evidence:
    """Everything the report shows: the results of the stages before it; the last two only of an aligned merge."""

    calibration: Product
    scores: Product | None
    plan: Product
    candidate: Product
    base_report: Product
    candidate_report: Product
    speeds: Product
    gate: Product
    alignment: Product | None = None
    merged: Product | None = None

    @property
    def fit(self) -> Mapping[str, Any] | None:
        """Facts of the refit; None if there was none."""
        return self.merged.facts["alignment"] if self.merged else None

    def open_reports(self) -> tuple[EvalReport, EvalReport]:
        """Measurements of base and candidate, with their speeds."""
        return (
            open_report(self.base_report, self.speeds, "base"),
            open_report(self.candidate_report, self.speeds, "candidate"),
        )


def read_code_commit(root: Path) -> str:
    """Return the commit of the checkout, marked "+changes" if files differ from it; "unknown" outside Git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@task(task_run_name="report", cache_policy=NO_CACHE)
def report(job: Job, evidence: Evidence, seconds: Mapping[str, float]) -> Product:
    """Write the report page, the pictures and the model card, and put the card beside the weights.

    Raises:
        OutputError: if they cannot be written.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        plan, scores = open_plan(evidence.plan), open_scores(evidence.scores)
        base, candidate = evidence.open_reports()
        data = ReportData(
            recipe=job.recipe.model_dump(mode="json"),
            plan=plan,
            scores=scores,
            base=base,
            candidate=candidate,
            recoveries=recover_tasks(base, candidate, seed=job.recipe.seed),
            gate=evidence.gate.facts,
            provenance={
                "base_model": job.recipe.model.label,
                "revision": job.base["revision"],
                "digest": job.base["digest"],
                "candidate_digest": evidence.candidate.facts["digest"],
                "calibration_digest": evidence.calibration.facts["digest"],
                "calibration_rev": calibration_revision(job),
                **describe_alignment_table(job, evidence),
                "code_commit": read_code_commit(job.place.root),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": job.command,
            },
            stages=seconds,
            registered=None
            if evidence.gate.facts["verdict"] == "fail"
            else registered_address(job.recipe, "candidate"),
            alignment=evidence.fit,
        )
        write_report(data, folder)
        write_card(data, folder)
        if evidence.fit and evidence.alignment:
            written = alignment_json(evidence.fit, evidence.alignment.facts["digest"])
            (folder / "alignment.json").write_text(written, encoding="utf-8")
        (folder / "plan.png").write_bytes(draw_plan(plan))
        if scores is not None:
            (folder / "similarity.png").write_bytes(
                draw_similarity(scores.values, plan, job.recipe.name, scores.meaning)
            )
        return {"verdict": evidence.gate.facts["verdict"]}

    inputs = {name: product.digest for name, product in vars(evidence).items() if product is not None}
    settings = {"recipe": job.recipe.model_dump(mode="json", exclude={"registry": {"tracking_uri"}})}
    made = produce(job.place.stages, "report", version=VERSION, settings=settings, inputs=inputs, make=make)
    card = evidence.candidate.folder / MODEL_FOLDER / "README.md"
    card.write_bytes((made.folder / "README.md").read_bytes())
    return made


def registered_address(recipe: Recipe, alias: str) -> str:
    """Address under which MLflow loads the registered model."""
    return f"models:/{recipe.registered_name}@{alias}"


def calibration_revision(job: Job) -> str:
    """Commit the calibration table was read at, or "working copy"."""
    return job.versions[str(job.recipe.calibration.path)].rev or "working copy"


def describe_alignment_table(job: Job, evidence: Evidence) -> dict[str, str]:
    """Digest and commit of the alignment table; empty if nothing was refitted."""
    if evidence.alignment is None:
        return {}
    revision = job.versions[str(job.recipe.alignment.path)].rev or "working copy"
    return {"alignment_digest": evidence.alignment.facts["digest"], "alignment_rev": revision}
