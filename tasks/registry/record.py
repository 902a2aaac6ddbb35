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
from mka.outside.printable import hide_passwords
from mka.pipeline.holding import verify_base
from mka.pipeline.judge import confirm_gate
from mka.pipeline.stage import MODEL_FOLDER, Found, find_model
from mka.recipe import Recipe
from mka.store.products import Product, stage_key
from tasks.base_model import is_worth_retrying
from tasks.machine.workplace import Workplace
from tasks.registry.evidence import describe_origin, log_evidence
from tasks.registry.held import CARD, fetch_back, lay_out
from tasks.registry.naming import refuse_recipe_names
from tasks.registry.tracking import (
    CANDIDATE,
    COMPLETE,
    EXPERIMENT,
    connect_registry,
    hold_registered,
    registry_address,
)
from tasks.stages import Run

VERSION = 1
# Tag of a run: the registered model it makes a version of.
REGISTERS = "mka.registers"
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
    """Find out that the registry answers, and takes the recipe's names, before hours are spent on what it remembers.

    Raises:
        RegistryError: if it cannot be reached, or would refuse a name.
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

    One process at a time registers a name, and looks there first: what others register meanwhile is found, and a run
    that says it is running was killed.

    Raises:
        RegistryError: if the registry cannot be reached, or does not hold what was measured afterwards.
        GuardError: if the stored gate is not what the reports say.
        StoreError: if the base, or what a stage made, has changed since.
    """
    verify_base(run.job.base)
    verdict, name = confirm_gate(run.job, found)["verdict"], run.job.recipe.registered_name
    inputs = {stage: product.digest for stage, product in found.items()}
    key = stage_key("register", VERSION, {"name": name}, inputs)
    uri = registry_address(run.place, run.job.recipe)
    with hold_registered(uri, name, "registration"), connect_registry(uri) as client:
        _end_killed(client, name)
        if verdict == "fail":
            if (refused := _find_refused(client, key)) is not None:
                return Registration(uri, refused, None, None, (), True)
        elif (registered := _find_version(client, name, key)) is not None:
            whole = registered.tags.get(COMPLETE) == "true"
            if whole:
                aliases = tuple(client.get_model_version(name, registered.version).aliases)
            else:
                # An earlier run was killed between registering this version and naming it.
                aliases = _complete(client, run.place, name, registered.version, find_model(found))
            return Registration(uri, registered.run_id, name, str(registered.version), aliases, whole)
        import mlflow

        with _experiment_run(run, key, name) as record:
            log_evidence(run, found)
            if verdict == "fail":
                return Registration(uri, record.info.run_id, None, None, (), False)
            address = _log_model(run, found)
        # It prints to the terminal what the summary says at the end.
        with redirect_stderr(io.StringIO()):
            version = mlflow.register_model(address, name, tags=describe_origin(run, found) | {"mka.key": key}).version
        aliases = _complete(client, run.place, name, version, find_model(found))
        return Registration(uri, record.info.run_id, name, str(version), aliases, False)


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


def _end_killed(client: Any, name: str) -> None:
    """End the records of registrations of a name that were killed: whoever holds its lock is the only one alive."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return
    running = f"tags.`{REGISTERS}` = '{name}' and attributes.status = 'RUNNING'"
    for left in client.search_runs([experiment.experiment_id], running):
        client.set_terminated(left.info.run_id, "KILLED")


def _complete(client: Any, place: Workplace, name: str, version: str, candidate: Product) -> tuple[str, ...]:
    """Compare what the registry holds with what was measured, then point "candidate" at it.

    Raises:
        RegistryError: if it is anything else; the version is removed again.
    """
    try:
        with fetch_back(place, name, version, candidate.facts["digest"]) as held:
            if not (held / CARD).is_file():
                raise RegistryError(f"the registry lacks {CARD} of {name} version {version}")
    except (RegistryError, OSError) as error:
        client.delete_model_version(name, version)
        raise RegistryError(f"{error}; the version was removed again") from None
    client.set_registered_model_alias(name, CANDIDATE, version)
    client.set_model_version_tag(name, version, COMPLETE, "true")
    return (CANDIDATE,)


@contextmanager
def _experiment_run(run: Run, key: str, name: str) -> Iterator[Any]:
    import mlflow

    if mlflow.get_experiment_by_name(EXPERIMENT) is None:
        uses_default = registry_address(run.place, run.job.recipe) == run.place.tracking_uri
        try:
            mlflow.create_experiment(EXPERIMENT, artifact_location=run.place.model_artifacts if uses_default else None)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another model's first run was faster
                raise
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=run.name, tags={"mka.key": key, REGISTERS: name}) as record:
        yield record


def _log_model(run: Run, found: Found) -> str:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec("string")])
    signature = ModelSignature(text, text, ParamSchema([ParamSpec("max_new_tokens", "long", 32)]))
    candidate, card = find_model(found), found["report"].open() / CARD
    with lay_out(run.place, candidate.open() / MODEL_FOLDER, card, candidate.facts["digest"]) as folder:
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": str(folder)},
            pip_requirements=pinned_requirements(),
            signature=signature,
            tags=describe_origin(run, found),
            model_type="hf-causal-lm",
        )
    return str(info.model_uri)


def pinned_requirements() -> list[str]:
    """Installed versions of what serving needs."""
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS]


def as_facts(registration: Registration) -> dict[str, Any]:
    """JSON-able form for last_run.json and pages, without a password."""
    shown = {"tracking_uri": hide_passwords(registration.tracking_uri), "aliases": list(registration.aliases)}
    return asdict(registration) | shown
