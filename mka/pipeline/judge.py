"""Judge: the gate over what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.errors import GuardError
from mka.evaluation.gate import decide
from mka.evaluation.rules import asks_control, asks_engines, asks_speed
from mka.pipeline.evaluate import BASE, CANDIDATE, EVALUATE_CONTROL, ROLES, SPEED, open_report
from mka.pipeline.job import Job
from mka.pipeline.serve import SERVE
from mka.pipeline.stage import Cost, Found, Stage
from mka.report.verdict import tell_checks


def decide_reports(job: Job, found: Found) -> dict[str, Any]:
    """Decide the gate from the reports of base, candidate and control; returns the decision as it is stored.

    Raises:
        MkaError: as `mka.evaluation.gate.decide`.
    """
    base, candidate, control = (open_report(found, role) for role in ROLES)
    served = found[SERVE.name].facts if SERVE.name in found else None
    decided = decide(base, candidate, job.recipe.gate, seed=job.recipe.seed, control=control, served=served).to_dict()
    return dict(json.loads(json.dumps(decided)))


def confirm_gate(job: Job, found: Found) -> Mapping[str, Any]:
    """Decide the gate again from the reports, and return the decision if the stored one is the same.

    A stored decision is for reading. What is registered or promoted rests on the reports.

    Raises:
        GuardError: if the stored decision is another.
        MkaError: as `decide_reports`.
    """
    decided, stored = decide_reports(job, found), found[GATE.name]
    if _round(decided) != _round(stored.facts):
        raise GuardError(
            f"the stored gate says {stored.facts.get('verdict')!r} and is not what the reports say, "
            f"{decided['verdict']!r} ({tell_checks(decided)}); it was changed: remove {stored.folder} and run again"
        )
    return decided


def _round(decision: Mapping[str, Any]) -> Any:
    # Another release of numpy may sum in another order.
    return json.loads(json.dumps(dict(decision)), parse_float=lambda number: f"{float(number):.9g}")


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    return decide_reports(job, found)


def _read(job: Job, found: Found) -> dict[str, str]:
    gate, names = job.recipe.gate, {"base": BASE, "candidate": CANDIDATE}
    if asks_control(gate) and EVALUATE_CONTROL.name in found:
        names["control"] = EVALUATE_CONTROL.name
    if asks_speed(gate):
        names["speeds"] = SPEED.name
    if asks_engines(gate):
        names["engines"] = SERVE.name
    return {key: found[name].digest for key, name in names.items()}


GATE = Stage(
    "gate",
    version=3,
    wanted=lambda job: job.judged,
    reads=_read,
    settings=lambda job: job.recipe.gate.model_dump(exclude={"champion_recovery"}) | {"seed": job.recipe.seed},
    make=_make,
    foresee=lambda job: Cost(files=("evidence/gate.json",)),
)
