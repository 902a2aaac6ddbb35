"""Judge: the gate over both measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.errors import GateRefused
from mka.evaluation.gate import decide
from mka.pipeline.evaluate import BASE, CANDIDATE, open_report
from mka.pipeline.job import Job
from mka.pipeline.stage import Cost, Found, Stage


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    base, candidate = open_report(found[BASE]), open_report(found[CANDIDATE])
    return decide(base, candidate, job.recipe.gate, seed=job.recipe.seed).to_dict()


GATE = Stage(
    "gate",
    version=2,
    wanted=lambda job: job.measured,
    reads=lambda job, found: {"base": found[BASE].digest, "candidate": found[CANDIDATE].digest},
    settings=lambda job: job.recipe.gate.model_dump(exclude={"champion_recovery"}) | {"seed": job.recipe.seed},
    make=_make,
    foresee=lambda job: Cost(files=("evidence/gate.json",)),
)


def refuse_failed(decision: Mapping[str, Any] | None, where: Path) -> GateRefused | None:
    """Return the refusal of a failed verdict, for the caller to raise once it has shown the result."""
    if decision is None or decision["verdict"] != "fail":
        return None
    short = "; ".join(
        f"{c['name']}: recovery {c['recovery']:.3f}, at most {c['upper']:.3f}, needed {c['threshold']:g}"
        for c in decision["checks"]
        if c["verdict"] == "fail"
    )
    return GateRefused(f"the gate failed this candidate ({short}); evidence in {where}")
