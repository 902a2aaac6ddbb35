"""Report: the page, the card and the pictures of one job."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mka.alignment.table import alignment_json
from mka.evaluation.gate import recover_tasks
from mka.healing.table import healing_json
from mka.model.card import read_license
from mka.model.config import find_reader
from mka.model.weights import read_json
from mka.pipeline.evaluate import open_reports
from mka.pipeline.job import Job
from mka.pipeline.plan import open_plan
from mka.pipeline.score import open_scores
from mka.pipeline.serve import SERVE
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.pipeline.transform import describe_treatments
from mka.report.data import ReportData
from mka.report.page import write_card, write_report


def gather_evidence(job: Job, found: Found) -> ReportData:
    """Put together what page and card show."""
    base, candidate, control = open_reports(job, found)
    gate = found["gate"].facts if "gate" in found else None
    inputs = job.inputs
    calibration = {"calibration_digest": inputs.calibration.digest if inputs.calibration else None}
    alignment = {"alignment_digest": inputs.alignment.digest} if inputs.alignment else {}
    healing = {"healing_digest": inputs.healing.digest} if inputs.healing else {}
    reader = find_reader(read_json(find_model(found).folder / MODEL_FOLDER / "config.json"))
    return ReportData(
        recipe=job.recipe.model_dump(mode="json"),
        plan=open_plan(found)[0],
        scores=open_scores(job, found),
        base=base,
        candidate=candidate,
        control=control,
        gate=gate,
        recoveries=recover_tasks(base, candidate, seed=job.recipe.seed) if gate else (),
        provenance={
            "base_model": job.recipe.model.label,
            "revision": job.revision,
            "digest": job.base.digest,
            **read_license(job.base.path),
            "candidate_digest": candidate.checkpoint["digest"],
            **({"needs_transformers": f"{reader} or newer"} if reader else {}),
            **calibration,
            **alignment,
            **healing,
            **({"text_of_the_base": inputs.own_text.describe()} if inputs.own_text else {}),
            **({"transformed": describe_treatments(job)} if job.treatments else {}),
            **job.provenance,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": job.command,
        },
        stages={name: product.seconds for name, product in found.items()},
        registered=None if gate and gate["verdict"] == "fail" else job.registered,
        cached=job.output is None,
        alignment=find_fit(found),
        healing=find_healing(found),
        rounding=found["quantize"].facts.get("rounding") if "quantize" in found else None,
        served=found[SERVE.name].facts if SERVE.name in found else {},
    )


def find_fit(found: Found) -> Mapping[str, Any] | None:
    """Return the facts of the refit; None if there was none."""
    return found["merge"].facts.get("alignment")


def find_healing(found: Found) -> Mapping[str, Any] | None:
    """Return the facts of the healing; None if there was none."""
    return found["heal"].facts["healing"] if "heal" in found else None


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    from mka.report.pictures import draw_plan, draw_similarity

    data = gather_evidence(job, found)
    write_report(data, folder)
    write_card(data, folder)
    if data.alignment is not None and job.inputs.alignment is not None:
        written = alignment_json(data.alignment, job.inputs.alignment.digest)
        (folder / "alignment.json").write_text(written, encoding="utf-8")
    if data.healing is not None and job.inputs.healing is not None:
        written = healing_json(data.healing, job.inputs.healing.digest)
        (folder / "healing.json").write_text(written, encoding="utf-8")
    (folder / "plan.png").write_bytes(draw_plan(data.plan))
    if data.scores is not None:
        picture = draw_similarity(data.scores.values, data.plan, job.recipe.name, data.scores.meaning)
        (folder / "similarity.png").write_bytes(picture)
    return {"verdict": data.gate["verdict"] if data.gate else None}


def _settings(job: Job) -> dict[str, Any]:
    recipe = job.recipe.model_dump(mode="json", exclude={"registry": {"tracking_uri"}})
    # All are printed on the page. A base's card is no part of its digest.
    return {
        "recipe": recipe,
        "output": str(job.output) if job.output else None,
        "registered": job.registered,
        "license": read_license(job.base.path),
    }


REPORT = Stage(
    "report",
    version=5,
    reads=lambda job, found: (
        {name: product.digest for name, product in found.items()} | {"model": find_model(found).digest}
    ),
    settings=_settings,
    make=_make,
    foresee=lambda job: Cost(files=("evidence/recipe.yaml", "evidence/report.html")),
)
