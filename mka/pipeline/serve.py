"""Serve: base and candidate loaded by the engines that a recipe names, held against transformers and timed in turns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.engines import get_engine
from mka.errors import EngineError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.foresee import whole_model
from mka.pipeline.job import Job
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.recipe import EngineCheck

if TYPE_CHECKING:
    from mka.engines.serve import ServeReport

SERVED_FILE = "engines.json"


def serve_stage(digest: str | None = None, folder: Path | None = None) -> Stage:
    """Return the stage that loads base and candidate into engines.

    Args:
        digest: of the candidate; None: of the last model made.
        folder: where it is.
    """

    def read(job: Job, found: Found) -> dict[str, str]:
        return {"base": job.base.digest, "candidate": digest or find_model(found).facts["digest"]}

    def make(job: Job, found: Found, output: Path) -> Mapping[str, Any]:
        candidate = folder or find_model(found).open() / MODEL_FOLDER
        reports = {asked.engine: _check(job, candidate, asked, output) for asked in job.recipe.engines}
        written = {name: report.to_dict() for name, report in reports.items()}
        (output / SERVED_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        return {name: _keep(report) for name, report in reports.items()}

    return Stage(
        "serve",
        version=3,
        wanted=lambda job: bool(job.recipe.engines),
        reads=read,
        settings=_settings,
        make=make,
        foresee=lambda job: Cost(memory=2 * whole_model(job), files=(f"evidence/{SERVED_FILE}",)),
        describe=lambda job: f"serve: {', '.join(asked.engine for asked in job.recipe.engines)}",
    )


def _check(job: Job, candidate: Path, asked: EngineCheck, output: Path) -> "ServeReport":
    from mka.engines.serve import COULD_NOT, check_serving
    from mka.engines.subject import Conditions

    engine, model = get_engine(asked.engine), job.recipe.model
    report = check_serving(
        open_checkpoint(candidate, verify=False),
        job.base,
        engine,
        asked,
        python=engine.find_python(),
        work=output,
        conditions=Conditions(model.dtype, model.trust_remote_code, job.recipe.seed, job.command),
    )
    if report.verdict == COULD_NOT:  # nothing is known, and nothing is stored
        raise EngineError(str(report.reason))
    return report


def _keep(report: "ServeReport") -> dict[str, Any]:
    """Return what gate, page and registry read of a report."""
    from mka.engines.serve import PASS
    from mka.engines.table import list_rows
    from mka.engines.timing import FIGURES

    sides = [side.speed if side else {} for side in (report.base, report.candidate)]
    ratios: dict[str, dict[str, float]] = {name: {} for name in FIGURES}
    for count in sides[1].keys() & sides[0].keys():
        for name in sides[1][count].keys() & sides[0][count].keys():
            ratios[name][count] = sides[1][count][name]["median"] / sides[0][count][name]["median"]
    return {
        "loads": report.verdict == PASS,
        "verdict": report.verdict,
        "reason": report.reason,
        "engine": dict(report.engine),
        "conditions": {key: value for key, value in report.conditions.items() if key != "command"},
        "ratios": ratios,
        "rows": list_rows(report),
    }


def _settings(job: Job) -> dict[str, Any]:
    """What an engine may use decides no figure; another version of it may."""
    asked = [
        check.model_dump(mode="json", exclude={"limit", "memory"})
        | {"version": get_engine(check.engine).find_version()}
        for check in job.recipe.engines
    ]
    return {"engines": asked, "dtype": job.recipe.model.dtype, "seed": job.recipe.seed}


SERVE = serve_stage()
