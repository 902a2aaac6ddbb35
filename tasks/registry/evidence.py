"""What an MLflow run keeps of a recompression: settings, scores, the tables it read, and the files that prove it."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from mka.evaluation.metrics import find_metric
from mka.outside.printable import make_page
from mka.pipeline.evaluate import ROLES, open_reports
from mka.pipeline.report import find_healing
from mka.pipeline.score import open_scores
from mka.pipeline.serve import SERVE
from mka.pipeline.stage import Found, find_model
from mka.report.control import tell_against_control
from mka.report.markup import make_table
from mka.report.table import result_table
from mka.report.verdict import VERDICTS, describe_check
from mka.store.sums import file_sha256
from mka.texts.rows import read_rows
from tasks.guards import guard
from tasks.registry.naming import flatten_recipe
from tasks.registry.opened import NOTE
from tasks.stages import Run
from tasks.versioned import Version

# Of a check, what the registry keeps; "value" stands where a rule is not about recovery.
CHECK_PARTS = ("recovery", "value", "lower", "upper", "threshold")
# Of each model; the second is what its bytes are where nothing is held in more than 16 bits.
FILE_FACTS = ("layers", "parameters", "bytes", "served_bytes")
# Longer values of a table's tags are refused by MLflow.
TAG_CHARACTERS = 500
# MLflow's databases hold descriptions of 5,000 characters, of which a registered model's has some of its own.
NOTE_CHARACTERS = 4000


def describe_origin(run: Run, found: Found) -> dict[str, str]:
    """What ties a version to where it came from."""
    job = run.job
    alignment = {"alignment_digest": job.inputs.alignment.digest} if job.inputs.alignment else {}
    healing = {"healing_digest": job.inputs.healing.digest} if job.inputs.healing else {}
    return {
        "base_model": job.recipe.model.label,
        "base_revision": job.revision,
        "base_digest": job.base.digest,
        "candidate_digest": find_model(found).facts["digest"],
        "calibration_digest": found["calibration"].facts["digest"],
        **alignment,
        **healing,
        **{key: str(value) for key, value in job.provenance.items()},
        "recipe": job.recipe.name,
        "method": job.recipe.method.name,
        "verdict": found["gate"].facts["verdict"],
        **{f"engine.{name}": told["verdict"] for name, told in list_served(found).items()},
    }


def list_served(found: Found) -> Mapping[str, Mapping[str, Any]]:
    """Return what engines made of the candidate, by name; nothing where none was asked."""
    return found[SERVE.name].facts if SERVE.name in found else {}


def describe_result(run: Run, found: Found) -> str:
    """Say in Markdown what came out: verdict, base, control and candidate side by side, every check, the command."""
    base, candidate, control = open_reports(run.job, found)
    plan, gate = found["plan"].facts, found["gate"].facts
    told = [
        f"**{gate['verdict']}**: {VERDICTS[gate['verdict']]}. {plan['layers_in']} layers became {plan['layers_out']}.",
        make_table(result_table(base, candidate, control)),
        f"± is one standard error. {tell_against_control(base, candidate, control)}",
        make_table([describe_check(check) for check in gate["checks"]]),
        f"`{run.job.command}`",
    ]
    page = make_page("\n\n".join(told))
    if len(page) <= NOTE_CHARACTERS:
        return page
    whole, _, _ = page[:NOTE_CHARACTERS].rpartition("\n")
    return f"{whole}\n\nThe rest is in the report."


def log_evidence(run: Run, found: Found) -> Any:
    """Write a run's settings, tables and files into the MLflow run that is active.

    Returns:
        The held-out table as MLflow knows it; None if nothing was measured on one.
    """
    import mlflow

    job = run.job
    for params in _cut(flatten_recipe(job.recipe), 100):
        mlflow.log_params(params)
    mlflow.set_tags(describe_origin(run, found))
    mlflow.set_tag("against_control", tell_against_control(*open_reports(job, found)))
    mlflow.set_tag(NOTE, describe_result(run, found))
    heldout = _log_tables(run)
    mlflow.log_dict(job.recipe.model_dump(mode="json"), "recipe.yaml")
    mlflow.log_artifacts(str(found["report"].open()), "report")
    mlflow.log_artifacts(str(found["plan"].open()), "plan")
    if SERVE.name in found:
        mlflow.log_artifacts(str(found[SERVE.name].open()), "engines")
    for role in ROLES:
        if f"evaluate {role}" in found:
            mlflow.log_artifacts(str(found[f"evaluate {role}"].open()), f"evaluation/{role}")
    if open_scores(job, found) is not None:
        mlflow.log_artifacts(str(found["score"].open()), "scores")
    checks = run.place.checks / guard.PAGE
    if checks.exists():
        mlflow.log_artifact(str(checks), "checks")
    return heldout


def log_figures(run: Run, found: Found, heldout: Any, model_id: str | None) -> None:
    """Write what was measured into the MLflow run that is active.

    Args:
        run: the flow run.
        found: every product.
        heldout: the table that texts were read from, which their figures name.
        model_id: the logged model, which the candidate's figures and the gate's name; None if there is none.
    """
    import mlflow

    base, candidate, control = open_reports(run.job, found)
    for role, measured in zip(ROLES, (base, candidate, control)):
        if measured is None:
            continue
        owner = model_id if role == "candidate" else None
        on_texts: dict[str, float] = {}
        others: dict[str, float] = {f"{role}/{name}": value for name, value in measured.speed.items()}
        others |= {f"{role}/{name}": float(measured.checkpoint[name]) for name in FILE_FACTS}
        for score in measured.scores:
            metrics = on_texts if find_metric(score.metric).on == "texts" else others
            metrics[f"{role}/{score.name}/{score.metric}"] = score.value
            metrics[f"{role}/{score.name}/{score.metric}_stderr"] = score.stderr
        _send(on_texts, owner, heldout)
        _send(others, owner)
    judged: dict[str, float] = {}
    for check in found["gate"].facts["checks"]:
        bounds = {part: check[part] for part in CHECK_PARTS if check[part] is not None}
        if check["bound"] == "better_than":
            bounds["control"] = check["threshold"]
        judged |= {f"gate/{check['name']}/{part}": value for part, value in bounds.items()}
    for name, told in list_served(found).items():
        for figure, ratios in told["ratios"].items():
            judged |= {f"engine/{name}/{figure}_ratio_at_{count}": ratio for count, ratio in ratios.items()}
    judged["layer_ratio"] = found["plan"].facts["layer_ratio"]
    judged["size_ratio"] = 1.0 - candidate.checkpoint["bytes"] / base.checkpoint["bytes"]
    _send(judged, model_id)
    for point in (find_healing(found) or {}).get("curve", ()):
        noted = {f"heal/{name}": point[name] for name in ("loss", "rate", "heldout") if name in point}
        mlflow.log_metrics(noted, step=point["step"])


def _send(metrics: Mapping[str, float], model_id: str | None, dataset: Any = None) -> None:
    """Log figures that are finite, with whose they are and what they were measured on."""
    import mlflow
    from mlflow.entities import Metric

    active = mlflow.active_run()
    assert active is not None
    named = {"model_id": model_id, "run_id": active.info.run_id}
    if dataset is not None:
        named |= {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
    now = time.time_ns() // 1_000_000
    # MLflow's own function would put down what is nobody's to the model that was logged last.
    for part in _cut({name: float(value) for name, value in metrics.items() if value == value}, 1000):
        rows = [Metric(name, value, now, 0, **named) for name, value in part.items()]
        mlflow.MlflowClient().log_batch(active.info.run_id, metrics=rows)


def _cut(values: Mapping[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """Yield parts of a mapping: MLflow takes so many at a time."""
    names = list(values)
    for start in range(0, len(names), most):
        yield {name: values[name] for name in names[start : start + most]}


def _log_tables(run: Run) -> Any:
    """Name every table of texts with its revision and digest, as the run read it; returns the held-out one."""
    import mlflow
    import pandas as pd

    job = run.job
    contexts = {job.recipe.calibration.path: "calibration"}
    if job.inputs.alignment is not None:
        contexts.setdefault(job.recipe.alignment.path, "alignment")
    if job.inputs.healing is not None:
        contexts.setdefault(job.recipe.heal.path, "healing")
    if job.recipe.evaluation.text is not None:
        contexts[job.recipe.evaluation.text] = "evaluation"
    heldout = None
    for path, context in contexts.items():
        version = run.versions.get(str(path))
        if version is None:
            assert job.inputs.own_text is not None
            file = job.inputs.own_text.file
            version = Version(str(path), "written by the base", file_sha256(file))
        else:
            file = run.tables.open() / version.copy
        table = pd.DataFrame(read_rows(file))
        dataset = mlflow.data.from_pandas(table, source=str(path), name=path.stem, digest=version.digest[:36])
        tags = {"dvc_rev": version.rev or "working copy", "dvc_path": str(path), "hash": version.digest}
        shown = {name: value[-TAG_CHARACTERS:] for name, value in tags.items()}
        mlflow.log_input(dataset, context=context, tags=shown)
        if path == job.recipe.evaluation.text:
            heldout = dataset
    return heldout
