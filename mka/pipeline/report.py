"""The stage that writes page and card."""

import json
from datetime import UTC, datetime
from pathlib import Path

from mka.alignment.table import alignment_json
from mka.errors import GateRefused
from mka.evaluation.gate import GateDecision, recover_tasks
from mka.evidence.states import LayerScores
from mka.pipeline.job import EVIDENCE, Job
from mka.pipeline.stage import Compression
from mka.report.data import ReportData
from mka.report.page import write_card, write_report
from mka.report.verdict import tell_checks


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
    short = tell_checks(decision.to_dict(), "fail")
    return GateRefused(f"the gate failed this candidate ({short}); evidence in {where}")
