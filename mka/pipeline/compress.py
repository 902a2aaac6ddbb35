"""All of it in one call, with no orchestrator: the pipeline on the work folder's store, then a folder of one's own."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.evaluation.scores import EvalReport
from mka.export.folder import export_folder
from mka.pipeline.evaluate import ROLES, open_reports
from mka.pipeline.foresee import COMPANIONS_NBYTES, candidate_nbytes
from mka.pipeline.holding import hold_base, refuse_other
from mka.pipeline.job import Job
from mka.pipeline.pipeline import run
from mka.pipeline.plan import open_plan
from mka.pipeline.report import find_fit, find_healing
from mka.pipeline.score import open_scores
from mka.pipeline.serve import SERVE, SERVED_FILE
from mka.pipeline.stage import MODEL_FOLDER, SCORES_FILE, Found, Tell, find_model
from mka.plan.plan import MergePlan
from mka.store.products import reading
from mka.store.publishing import check_room, publish

EVIDENCE = "evidence"


@dataclass(frozen=True)
class Compression:
    """What came of one compression.

    Attributes:
        output: the published folder.
        plan: what was merged.
        base: measurements of the base, or its facts alone.
        candidate: the same of the candidate.
        control: measurements of the control, which is the base where nothing is rounded; None if nothing was measured.
        gate: the decision, as `mka.evaluation.gate.GateDecision.to_dict` gives it; None if it had nothing to decide on.
        seconds: stage -> seconds it took when it was made.
        alignment: facts of the refit; None if there was none.
        healing: facts of the healing; None if there was none.
    """

    output: Path
    plan: MergePlan
    base: EvalReport
    candidate: EvalReport
    control: EvalReport | None
    gate: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    alignment: Mapping[str, Any] | None = None
    healing: Mapping[str, Any] | None = None


def compress(job: Job, store: Path, output: Path, *, tell: Tell) -> Compression:
    """Compress and publish a stock model folder with its card, and its evidence in a folder inside.

    Every stage's result is kept in the store: killed, the same call goes on where it was. The folder is published whole
    or not at all; a candidate that the gate fails is published too, with the verdict in its card.

    Args:
        job: what `mka.pipeline.job.prepare` checked.
        store: folder of all stages' results.
        output: folder to publish; must not exist.
        tell: called with name and result of each stage as soon as it has ended.

    Raises:
        MkaError: if any stage refuses; nothing is published then.
    """
    needed = candidate_nbytes(job) + COMPANIONS_NBYTES
    check_room(output, needed)
    found = run(job, lambda stage, job, found: stage.produce(job, found, store), tell=tell)
    with publish(output, needed_bytes=needed) as partial, reading(), hold_base(job.base):
        export_folder(find_model(found).open() / MODEL_FOLDER, partial)
        shutil.copyfile(found["report"].open() / "README.md", partial / "README.md")
        _copy_evidence(job, found, partial / EVIDENCE)
        digest = find_model(found).facts["digest"]
        refuse_other(partial, digest, f"copy {partial} of the model", "nothing is published, run again")
    base, candidate, control = open_reports(job, found)
    seconds = {name: product.seconds for name, product in found.items()}
    gate = found["gate"].facts if "gate" in found else None
    plan, fits = open_plan(found)[0], (find_fit(found), find_healing(found))
    return Compression(output, plan, base, candidate, control, gate, seconds, *fits)


def _copy_evidence(job: Job, found: Found, folder: Path) -> None:
    import yaml

    folder.mkdir()
    recipe = yaml.safe_dump(job.recipe.model_dump(mode="json"), sort_keys=False)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    copied = [
        *(found["plan"].open().glob("plan*")),
        found["report"].open() / "report.html",
        *found["report"].open().glob("alignment.json"),
        *found["report"].open().glob("healing.json"),
    ]
    for file in copied:
        shutil.copyfile(file, folder / file.name)
    if scores := open_scores(job, found):
        scores.save(folder / SCORES_FILE)
    for role, report in zip(ROLES, open_reports(job, found)):
        if report is not None and f"evaluate {role}" in found:
            (folder / f"{role}.json").write_text(report.to_json(), encoding="utf-8")
    if SERVE.name in found:
        shutil.copyfile(found[SERVE.name].open() / SERVED_FILE, folder / SERVED_FILE)
    if "gate" in found:
        (folder / "gate.json").write_text(json.dumps(dict(found["gate"].facts), indent=2) + "\n", encoding="utf-8")
