"""MLflow: one run per recompression with its evidence, and the registered version it leads to.

Record and registration are keyed like every stage, by the digests of what is recorded. The registry itself is the
store: a version with the same key is found there and never made twice.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.errors import RegistryError
from mka.pipeline.evaluate import ROLES, open_reports
from mka.pipeline.report import find_healing
from mka.pipeline.score import open_scores
from mka.pipeline.stage import MODEL_FOLDER, Found, find_model
from mka.recipe import Recipe
from mka.report.control import tell_against_control
from mka.store.products import Product, stage_key
from mka.store.sums import file_sha256
from mka.texts.rows import read_rows
from tasks.base_model import is_worth_retrying
from tasks.guards import guard
from tasks.machine.workplace import Workplace
from tasks.registry.naming import refuse_recipe_names
from tasks.registry.tracking import CANDIDATE, COMPLETE, EXPERIMENT, connect_registry, registry_address
from tasks.stages import Run
from tasks.versioned import Version

VERSION = 1
# Of a check, what the registry keeps; "value" stands where a rule is not about recovery.
CHECK_PARTS = ("recovery", "value", "lower", "upper")
# Same environment for serving; named here so that MLflow does not import the model to guess them.
REQUIREMENTS = ("torch", "transformers", "compressed-tensors", "accelerate", "safetensors")


@dataclass(frozen=True)
class Registration:
    """Where a recompression is remembered.

    Attributes:
        tracking_uri: the MLflow store.
        run_id: its run.
        name: registered model; None if the gate refused it.
        version: its version.
        aliases: aliases that point at it.
        reused: found there, not made.
    """

    tracking_uri: str
    run_id: str
    name: str | None
    version: str | None
    aliases: tuple[str, ...]
    reused: bool


@task(task_run_name="reach registry", cache_policy=NO_CACHE)
def reach_registry(place: Workplace, recipe: Recipe) -> str:
    """Find out that the registry answers before hours are spent on what it has to remember.

    Raises:
        RegistryError: if it cannot be reached.
    """
    refuse_recipe_names(recipe)
    with connect_registry(registry_address(place, recipe)) as client:
        client.search_registered_models(max_results=1)
        return str(client.tracking_uri)


@task(
    task_run_name="register {run.job.recipe.registered_name}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=is_worth_retrying,
)
def register(run: Run, found: Found) -> Registration:
    """Record the run with its evidence; register the candidate unless the gate refused it.

    The alias "candidate" moves to the new version; "champion" is moved by promotion only.

    Raises:
        RegistryError: if the registry cannot be reached, or does not hold the whole model afterwards.
    """
    verdict, name = found["gate"].facts["verdict"], run.job.recipe.registered_name
    inputs = {stage: product.digest for stage, product in found.items()}
    key = stage_key("register", VERSION, {"name": name}, inputs)
    candidate = find_model(found)
    with connect_registry(registry_address(run.place, run.job.recipe)) as client:
        if verdict == "fail":
            if (refused := _find_refused(client, key)) is not None:
                return Registration(client.tracking_uri, refused, None, None, (), True)
        elif (registered := _find_version(client, name, key)) is not None:
            if registered.tags.get(COMPLETE) == "true":
                aliases = tuple(client.get_model_version(name, registered.version).aliases)
                return Registration(
                    client.tracking_uri, registered.run_id, name, str(registered.version), aliases, True
                )
            # An earlier run was killed between registering this version and naming it.
            aliases = _complete(client, name, registered.version, candidate)
            return Registration(client.tracking_uri, registered.run_id, name, str(registered.version), aliases, False)
        import mlflow

        with _experiment_run(run, key) as record:
            _log_evidence(run, found)
            if verdict == "fail":
                return Registration(client.tracking_uri, record.info.run_id, None, None, (), False)
            address = _log_model(run, found)
        # It prints to the terminal what the summary says at the end.
        with redirect_stderr(io.StringIO()):
            version = mlflow.register_model(address, name, tags=_tags(run, found) | {"mka.key": key}).version
        aliases = _complete(client, name, version, candidate)
        return Registration(client.tracking_uri, record.info.run_id, name, str(version), aliases, False)


def _find_version(client: Any, name: str, key: str) -> Any:
    """Find the version an earlier run with the same key registered, so that nothing is registered twice."""
    versions = client.search_model_versions(f"name = '{name}'")
    return next((version for version in versions if version.tags.get("mka.key") == key), None)


def _find_refused(client: Any, key: str) -> str | None:
    """Find the recorded run of a candidate the gate refused."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    runs = client.search_runs(
        [experiment.experiment_id], f"tags.`mka.key` = '{key}' and attributes.status = 'FINISHED'"
    )
    return str(runs[0].info.run_id) if runs else None


def _complete(client: Any, name: str, version: str, candidate: Product) -> tuple[str, ...]:
    """Check that the version is whole, then point "candidate" at it."""
    _require_whole(client, name, version, candidate)
    client.set_registered_model_alias(name, CANDIDATE, version)
    client.set_model_version_tag(name, version, COMPLETE, "true")
    return (CANDIDATE,)


@contextmanager
def _experiment_run(run: Run, key: str) -> Iterator[Any]:
    import mlflow

    if mlflow.get_experiment_by_name(EXPERIMENT) is None:
        uses_default = registry_address(run.place, run.job.recipe) == run.place.tracking_uri
        mlflow.create_experiment(EXPERIMENT, artifact_location=run.place.model_artifacts if uses_default else None)
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=run.name, tags={"mka.key": key}) as record:
        yield record


def _tags(run: Run, found: Found) -> dict[str, str]:
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
    }


def _log_evidence(run: Run, found: Found) -> None:
    import mlflow
    import pandas as pd

    job = run.job
    mlflow.log_params(pd.json_normalize(job.recipe.model_dump(mode="json")).iloc[0].to_dict())
    mlflow.set_tags(_tags(run, found))
    base, candidate, control = open_reports(job, found)
    mlflow.set_tag("against_control", tell_against_control(base, candidate, control))
    metrics: dict[str, float] = {}
    for role, measured in zip(ROLES, (base, candidate, control)):
        assert measured is not None
        for score in measured.scores:
            metrics[f"{role}/{score.name}/{score.metric}"] = score.value
            metrics[f"{role}/{score.name}/{score.metric}_stderr"] = score.stderr
        metrics |= {f"{role}/{name}": value for name, value in measured.speed.items()}
        metrics |= {f"{role}/{name}": float(measured.checkpoint[name]) for name in ("layers", "parameters", "bytes")}
    for check in found["gate"].facts["checks"]:
        bounds = {part: check[part] for part in CHECK_PARTS if check[part] is not None}
        if check["bound"] == "better_than":
            bounds["control"] = check["threshold"]
        metrics |= {f"gate/{check['name']}/{part}": value for part, value in bounds.items()}
    metrics["layer_ratio"] = found["plan"].facts["layer_ratio"]
    metrics["size_ratio"] = 1.0 - metrics["candidate/bytes"] / metrics["base/bytes"]
    mlflow.log_metrics({name: float(value) for name, value in metrics.items() if value == value})
    for point in (find_healing(found) or {}).get("curve", ()):
        noted = {f"heal/{name}": point[name] for name in ("loss", "rate", "heldout") if name in point}
        mlflow.log_metrics(noted, step=point["step"])
    contexts = {job.recipe.calibration.path: "calibration"}
    if job.inputs.alignment is not None:
        contexts.setdefault(job.recipe.alignment.path, "alignment")
    if job.inputs.healing is not None:
        contexts.setdefault(job.recipe.heal.path, "healing")
    if job.recipe.evaluation.text is not None:
        contexts[job.recipe.evaluation.text] = "evaluation"
    for path, context in contexts.items():
        version = run.versions.get(str(path))
        if version is not None:
            file = run.tables.folder / version.copy
        else:
            assert job.inputs.own_text is not None
            file = job.inputs.own_text.file
            version = Version(str(path), "written by the base", file_sha256(file))
        table = pd.DataFrame(read_rows(file))
        dataset = mlflow.data.from_pandas(table, source=str(path), name=path.stem, digest=version.digest[:36])
        tags = {"dvc_rev": version.rev or "working copy", "dvc_path": str(path), "hash": version.digest}
        mlflow.log_input(dataset, context=context, tags=tags)
    mlflow.log_dict(job.recipe.model_dump(mode="json"), "recipe.yaml")
    mlflow.log_artifacts(str(found["report"].folder), "report")
    mlflow.log_artifacts(str(found["plan"].folder), "plan")
    for role in ROLES:
        if f"evaluate {role}" in found:
            mlflow.log_artifacts(str(found[f"evaluate {role}"].folder), f"evaluation/{role}")
    if open_scores(job, found) is not None:
        mlflow.log_artifacts(str(found["score"].folder), "scores")
    checks = run.place.checks / guard.PAGE
    if checks.exists():
        mlflow.log_artifact(str(checks), "checks")


def _log_model(run: Run, found: Found) -> str:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec("string")])
    signature = ModelSignature(text, text, ParamSchema([ParamSpec("max_new_tokens", "long", 32)]))
    info = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"model": str(find_model(found).folder / MODEL_FOLDER)},
        pip_requirements=pinned_requirements(),
        signature=signature,
        tags=_tags(run, found),
        model_type="hf-causal-lm",
    )
    return str(info.model_uri)


def pinned_requirements() -> list[str]:
    """Installed versions of what serving needs."""
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS]


def _require_whole(client: Any, name: str, version: str, candidate: Product) -> None:
    """Make sure the registry holds every file of the model before any alias points there."""
    import mlflow

    wanted = {f.name for f in (candidate.folder / MODEL_FOLDER).iterdir()}
    held: set[str] = set()
    pending = [""]
    while pending:
        for entry in mlflow.artifacts.list_artifacts(
            artifact_uri=f"models:/{name}/{version}/{pending.pop()}".rstrip("/")
        ):
            if entry.is_dir:
                pending.append(entry.path)
            else:
                held.add(Path(entry.path).name)
    if missing := sorted(wanted - held):
        client.delete_model_version(name, version)
        raise RegistryError(f"registry lacks {missing[0]} of {name} version {version}; the version was removed again")


def as_facts(registration: Registration) -> dict[str, Any]:
    """JSON-able form for last_run.json."""
    return asdict(registration) | {"aliases": list(registration.aliases)}
