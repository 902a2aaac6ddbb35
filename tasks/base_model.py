"""The base model: fetched from where the recipe says, checked, digested."""

import time
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.errors import MkaError, RegistryError, UnreachableError
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.pipeline.job import check_feasible
from mka.recipe import ModelSource, Recipe
from tasks.machine.workplace import Workplace
from tasks.registry.source import bring_registered, find_registered


@dataclass(frozen=True)
class BaseModel:
    """A base model that is here.

    Attributes:
        checkpoint: opened and checked.
        revision: what pins it.
        seconds: what fetching took.
        reused: whether it was here before.
    """

    checkpoint: Checkpoint
    revision: str
    seconds: float
    reused: bool


def is_worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """Retry what the network may have broken; a refusal stays a refusal."""
    try:
        state.result()
    except (UnreachableError, RegistryError):
        return True
    except MkaError:
        return False
    except Exception:
        return True
    return False


@task(
    task_run_name="fetch {recipe.model.label}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=is_worth_retrying,
)
def fetch_base_model(place: Workplace, recipe: Recipe) -> BaseModel:
    """Bring the base model here as a stock folder and check it, and that the recipe can be carried out on it.

    Raises:
        CheckpointError: if it cannot be had, is damaged, inconsistent or unsupported.
        RecipeError: if the recipe asks for something this model cannot give.
    """
    from mka.model.stock import open_base
    from mka.sources.fetch import materialize, resolve_revision

    started = time.perf_counter()
    source, revision = recipe.model, None
    before = _built_folders(place)
    if source.registered is not None:
        version = find_registered(place, recipe)
        folder, revision = bring_registered(place, version), version.label
    else:
        folder = materialize(_at_root(place, source), place.work)
    # The files were compared with their sums a moment ago; once is enough.
    base = open_base(folder, trust_remote_code=source.trust_remote_code, verified=True)
    check_feasible(_find_tasks(place, recipe), base)
    reused = source.hub is None and _built_folders(place) == before
    return BaseModel(
        base, revision or resolve_revision(source, folder), round(time.perf_counter() - started, 3), reused
    )


def pin_base_model(place: Workplace, recipe: Recipe) -> dict[str, str]:
    """Return what pins a recipe's base as it is now, under the name its registered versions have it as a tag.

    A hub model is pinned by its commit and a package by its version (``base_revision``); a folder, a GGUF file and a
    registered model by the digest (``base_digest``), for which all of a folder or file is read.

    Raises:
        CheckpointError: if it cannot be found.
        RegistryError: if the registry does not have it.
    """
    from mka.sources.fetch import materialize, resolve_revision
    from mka.sources.hub import find_commit

    source = recipe.model
    if source.hub is not None:
        return {"base_revision": find_commit(source)}
    if source.registered is not None:
        return {"base_digest": find_registered(place, recipe).tags["candidate_digest"]}
    if source.folder is not None:
        folder = materialize(_at_root(place, source), place.work)
        return {"base_digest": open_checkpoint(folder, verify=False).digest}
    return {"base_revision": resolve_revision(source, place.work)}


def _at_root(place: Workplace, source: ModelSource) -> ModelSource:
    return source.model_copy(update={"folder": place.path(source.folder)}) if source.folder else source


def _find_tasks(place: Workplace, recipe: Recipe) -> Recipe:
    evaluation = recipe.evaluation
    places = {"tasks_folder": evaluation.tasks_folder, "include_path": evaluation.include_path}
    found = evaluation.model_copy(update={key: place.path(path) for key, path in places.items() if path is not None})
    return recipe.model_copy(update={"evaluation": found})


def _built_folders(place: Workplace) -> dict[str, int]:
    return {folder.name: folder.stat().st_ino for folder in (place.work / "models").glob("[!.]*")}
