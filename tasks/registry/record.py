"""MLflow: one run per recompression with its evidence, and the registered version it leads to.

Record and registration are keyed like every stage, by the digests of what is recorded. The registry itself is the
store: a version with the same key is found there and never made twice.
"""

import io
from contextlib import redirect_stderr
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
from tasks.registry.evidence import describe_origin, describe_result, log_evidence, log_figures
from tasks.registry.held import CARD, fetch_back, lay_out
from tasks.registry.naming import name_candidate, refuse_recipe_names
from tasks.registry.opened import KEY, NOTE, describe_source, drop_run, fill_run
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
ABOUT = (
    "Made smaller by recompression. `champion` is in use, `candidate` was registered last, `previous` was champion "
    "before. A version's description says what it keeps of its base, its tags where it came from; its run holds "
    "report, plan, recipe and data checks."
)
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
def register(run: Run, found: Found, opened: str) -> Registration:
    """Fill the MLflow run with the evidence; register the candidate unless the gate refused it.

    Where the registry holds the same already, its run is the one that counts, and the open one is dropped.

    The alias "candidate" moves to the new version; "champion" is moved by promotion only.

    One process at a time registers a name, and looks there first: what others register meanwhile is found.

    Args:
        run: the flow run.
        found: every product.
        opened: the MLflow run that `tasks.registry.opened` has opened for it.

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
        if verdict == "fail":
            if (refused := _find_refused(client, key)) is not None:
                drop_run(client, opened, refused)
                return Registration(uri, refused, None, None, (), True)
        elif (registered := _find_version(client, name, key)) is not None:
            whole = registered.tags.get(COMPLETE) == "true"
            if whole:
                aliases = tuple(client.get_model_version(name, registered.version).aliases)
            else:
                # An earlier run was killed between registering this version and naming it.
                aliases = _complete(client, run.place, name, registered.version, find_model(found))
                client.set_tag(registered.run_id, NOTE, _describe_version(client, run, found, registered.version))
                client.set_terminated(registered.run_id, "FINISHED")
            drop_run(client, opened, registered.run_id)
            return Registration(uri, registered.run_id, name, str(registered.version), aliases, whole)
        with fill_run(opened, key):
            heldout = log_evidence(run, found)
            logged = None if verdict == "fail" else _log_model(run, found)
            log_figures(run, found, heldout, logged and logged.model_id)
            if logged is None:
                return Registration(uri, opened, None, None, (), False)
            version = _make_version(run, found, logged.model_uri, key)
            _describe_version(client, run, found, version)
            aliases = _complete(client, run.place, name, version, find_model(found))
        return Registration(uri, opened, name, version, aliases, False)


def _make_version(run: Run, found: Found, address: str, key: str) -> str:
    """Register what was logged; returns the version."""
    import mlflow

    name = run.job.recipe.registered_name
    # It prints to the terminal what the summary says at the end.
    with redirect_stderr(io.StringIO()):
        made = mlflow.register_model(address, name, tags=describe_origin(run, found) | {KEY: key})
    return str(made.version)


def _describe_version(client: Any, run: Run, found: Found, version: str) -> str:
    """Say on the pages of model and version what came out; returns it."""
    name, told = run.job.recipe.registered_name, describe_result(run, found)
    client.update_model_version(name, version, told)
    written = client.get_registered_model(name).description
    if not written or written.startswith(ABOUT):  # what a person wrote there stays
        client.update_registered_model(name, f"{ABOUT}\n\nVersion {version}, the newest:\n\n{told}")
    return told


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


def _log_model(run: Run, found: Found) -> Any:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec("string")])
    signature = ModelSignature(text, text, ParamSchema([ParamSpec("max_new_tokens", "long", 32)]))
    candidate, card = find_model(found), found["report"].open() / CARD
    with lay_out(run.place, candidate.open() / MODEL_FOLDER, card, candidate.facts["digest"]) as folder:
        return mlflow.pyfunc.log_model(
            name=name_candidate(run.job, found),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": str(folder)},
            pip_requirements=pinned_requirements(),
            signature=signature,
            tags=describe_origin(run, found)
            | describe_source(run.place, run.job.command)
            | {NOTE: describe_result(run, found)},
            model_type="hf-causal-lm",
        )


def pinned_requirements() -> list[str]:
    """Installed versions of what serving needs."""
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in REQUIREMENTS]


def as_facts(registration: Registration) -> dict[str, Any]:
    """JSON-able form for last_run.json and pages, without a password."""
    shown = {"tracking_uri": hide_passwords(registration.tracking_uri), "aliases": list(registration.aliases)}
    return asdict(registration) | shown
