"""What an MLflow run keeps of a recompression: settings, scores, the tables it read, and the files that prove it."""

from collections.abc import Iterator, Mapping
from typing import Any

from mka.pipeline.evaluate import ROLES, open_reports
from mka.pipeline.report import find_healing
from mka.pipeline.score import open_scores
from mka.pipeline.serve import SERVE
from mka.pipeline.stage import Found, find_model
from mka.report.control import tell_against_control
from mka.store.sums import file_sha256
from mka.texts.rows import read_rows
from tasks.guards import guard
from tasks.registry.naming import flatten_recipe
from tasks.stages import Run
from tasks.versioned import Version

# Of a check, what the registry keeps; "value" stands where a rule is not about recovery.
CHECK_PARTS = ("recovery", "value", "lower", "upper", "threshold")
# Of each model; the second is what its bytes are where nothing is held in more than 16 bits.
FILE_FACTS = ("layers", "parameters", "bytes", "served_bytes")
# Longer values of a table's tags are refused by MLflow.
TAG_CHARACTERS = 500


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


def log_evidence(run: Run, found: Found) -> None:
    """Write a run's settings, scores, tables and files into the MLflow run that is active."""
    import mlflow

    job = run.job
    for params in _cut(flatten_recipe(job.recipe), 100):
        mlflow.log_params(params)
    mlflow.set_tags(describe_origin(run, found))
    base, candidate, control = open_reports(job, found)
    mlflow.set_tag("against_control", tell_against_control(base, candidate, control))
    metrics: dict[str, float] = {}
    for role, measured in zip(ROLES, (base, candidate, control)):
        assert measured is not None
        for score in measured.scores:
            metrics[f"{role}/{score.name}/{score.metric}"] = score.value
            metrics[f"{role}/{score.name}/{score.metric}_stderr"] = score.stderr
        metrics |= {f"{role}/{name}": value for name, value in measured.speed.items()}
        metrics |= {f"{role}/{name}": float(measured.checkpoint[name]) for name in FILE_FACTS}
    for check in found["gate"].facts["checks"]:
        bounds = {part: check[part] for part in CHECK_PARTS if check[part] is not None}
        if check["bound"] == "better_than":
            bounds["control"] = check["threshold"]
        metrics |= {f"gate/{check['name']}/{part}": value for part, value in bounds.items()}
    for name, told in list_served(found).items():
        for figure, ratios in told["ratios"].items():
            metrics |= {f"engine/{name}/{figure}_ratio_at_{count}": ratio for count, ratio in ratios.items()}
    metrics["layer_ratio"] = found["plan"].facts["layer_ratio"]
    metrics["size_ratio"] = 1.0 - metrics["candidate/bytes"] / metrics["base/bytes"]
    for finite in _cut({name: float(value) for name, value in metrics.items() if value == value}, 1000):
        mlflow.log_metrics(finite)
    for point in (find_healing(found) or {}).get("curve", ()):
        noted = {f"heal/{name}": point[name] for name in ("loss", "rate", "heldout") if name in point}
        mlflow.log_metrics(noted, step=point["step"])
    _log_tables(run)
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


def _cut(values: Mapping[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """Yield parts of a mapping: MLflow takes so many at a time."""
    names = list(values)
    for start in range(0, len(names), most):
        yield {name: values[name] for name in names[start : start + most]}


def _log_tables(run: Run) -> None:
    """Name every table of texts with its revision and digest; it is read as the run read it."""
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
