"""Judge: the gate over both measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.errors import GateRefused
from mka.evaluation.gate import decide
from mka.evaluation.rules import asks_speed
from mka.pipeline.evaluate import BASE, CANDIDATE, SPEED, open_report
from mka.pipeline.job import Job
from mka.pipeline.stage import Cost, Found, Stage
from mka.report.verdict import tell_checks


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    base, candidate = (open_report(found, role) for role in ("base", "candidate"))
    return decide(base, candidate, job.recipe.gate, seed=job.recipe.seed).to_dict()


def _read(job: Job, found: Found) -> dict[str, str]:
    names = {"base": BASE, "candidate": CANDIDATE} | ({"speeds": SPEED.name} if asks_speed(job.recipe.gate) else {})
    return {key: found[name].digest for key, name in names.items()}


GATE = Stage(
    "gate",
    version=2,
    wanted=lambda job: job.judged,
    reads=_read,
    settings=lambda job: job.recipe.gate.model_dump(exclude={"champion_recovery"}) | {"seed": job.recipe.seed},
    make=_make,
    foresee=lambda job: Cost(files=("evidence/gate.json",)),
)


def refuse_failed(decision: Mapping[str, Any] | None, where: Path) -> GateRefused | None:
    """Return the refusal of a failed verdict, for the caller to raise once it has shown the result."""
    if decision is None or decision["verdict"] != "fail":
        return None
    return GateRefused(f"the gate failed this candidate ({tell_checks(decision, 'fail')}); evidence in {where}")
