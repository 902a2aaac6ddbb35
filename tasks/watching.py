"""Has a base model changed since its champion was made? And who starts the recompression, once."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.pipeline.recipes import load_recipe
from mka.recipe import Recipe
from tasks.base_model import is_worth_retrying, pin_base_model
from tasks.machine.deployments import find_deployment
from tasks.machine.workplace import Workplace
from tasks.refusing import REFUSED
from tasks.registry.tracking import CHAMPION, COMPLETE, connect_registry, registry_address

EVENT = "base-model.updated"
# How often a recompression that failed or crashed is started again.
RETRIES = 2


def shorten(pin: str) -> str:
    """Cut a commit or digest to what a person compares; a package's version stays whole."""
    return pin[:16] if re.fullmatch("[0-9a-f]{40,}", pin) else pin


@dataclass(frozen=True)
class BaseChange:
    """What was found out about the base model of one recipe.

    Attributes:
        recipe: path of the recipe, relative to the project's root if it lies below it.
        model: registered model it leads to.
        base_model: what the base is called.
        pinned_by: tag that pins it, "base_revision" or "base_digest".
        now: its revision or digest now.
        known: that of the champion, or of the newest version if there is no champion; None if nothing is registered.
        made: version that was made from the revision of now; None if there is none.
    """

    recipe: str
    model: str
    base_model: str
    pinned_by: str
    now: str
    known: str | None
    made: str | None

    @property
    def is_due(self) -> bool:
        """Whether a recompression is wanted: the first one too, which somebody has to ask for."""
        return self.now != self.known and self.made is None

    @property
    def is_first(self) -> bool:
        """Whether there is no version yet that could have been made from another base."""
        return self.known is None and self.made is None

    @property
    def key(self) -> str:
        """What makes a recompression of this base by this recipe one and the same, whoever starts it."""
        body = json.dumps([self.model, self.recipe, self.pinned_by, self.now])
        return f"base-model-{hashlib.sha256(body.encode()).hexdigest()[:32]}"

    def describe(self) -> str:
        """Say it in one line."""
        known = shorten(self.known) if self.known else "nothing registered"
        line = f"{self.base_model} at {shorten(self.now)}, {self.model} knows {known}"
        if self.now == self.known:
            return f"{line}: unchanged"
        if self.is_first:
            return line
        return f"{line}: version {self.made} was made from it" if self.made else f"{line}: changed"


@task(
    task_run_name="look at the base of {recipe}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=is_worth_retrying,
)
def compare_base_model(place: Workplace, recipe: str) -> BaseChange:
    """Compare a recipe's base model, as it is now, with the one its champion was made from.

    Raises:
        RecipeError: if the recipe is refused.
        CheckpointError: if the base model cannot be found.
        RegistryError: if the registry cannot be reached.
    """
    path = place.path(Path(recipe)).resolve()
    # One spelling for all watchers: it is part of what makes two recompressions the same.
    recipe = str(place.relative(path))
    loaded = load_recipe(path)
    ((pinned_by, now),) = pin_base_model(place, loaded).items()
    known, made = _read_known(place, loaded, pinned_by, now)
    return BaseChange(recipe, loaded.registered_name, loaded.model.label, pinned_by, now, known, made)


def _read_known(place: Workplace, recipe: Recipe, pinned_by: str, now: str) -> tuple[str | None, str | None]:
    name = recipe.registered_name
    with connect_registry(registry_address(place, recipe)) as client:
        versions = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(COMPLETE) == "true"]
        if not versions:
            return None, None
        versions.sort(key=lambda version: int(version.version))
        champion = str(client.get_registered_model(name).aliases.get(CHAMPION))
        counted = next((v for v in versions if str(v.version) == champion), versions[-1])
        made = [str(v.version) for v in versions if v.tags.get(pinned_by) == now]
        return counted.tags.get(pinned_by), made[-1] if made else None


@dataclass(frozen=True)
class Started:
    """A recompression that was asked for.

    Attributes:
        run: name of the flow run.
        run_id: its id.
        is_new: whether this call made it; False if it was there.
        state: its state by name, e.g. "Scheduled".
        attempt: how many were started for the same base before.
    """

    run: str
    run_id: str
    is_new: bool
    state: str
    attempt: int


@task(task_run_name="recompress {change.model}", cache_policy=NO_CACHE)
def start_recompression(change: BaseChange, deployment: str, retries: int = RETRIES) -> Started:
    """Start a deployment for a changed base, once: the server keeps one run per key, however many ask for it.

    What has failed or crashed is started again under a key of its own. What the gate refused, or somebody cancelled, is
    not: it would come to the same.

    Args:
        change: what has changed.
        deployment: what to start, ``flow/deployment``.
        retries: how often at most it is started again.

    Returns:
        The last run there is for this base.

    Raises:
        WatchError: if there is no such deployment on the server.
    """
    from prefect.client.orchestration import get_client
    from prefect.events import emit_event

    asked = str(uuid4())
    with get_client(sync_client=True) as client:
        found = find_deployment(client, deployment)
        for attempt in range(1 + max(0, retries)):
            run = client.create_flow_run_from_deployment(
                found.id,
                parameters={"recipe": change.recipe},
                idempotency_key=f"{change.key}-{attempt}" if attempt else change.key,
                tags=[EVENT],
                labels={"mka.asked": asked},
            )
            is_new = run.labels.get("mka.asked") == asked
            if is_new or not has_broken(run.state):
                break
    if is_new:
        payload: dict[str, Any] = {"recipe": change.recipe, "base_model": change.base_model, "model": change.model}
        payload |= {"revision": change.now, "revision_before": change.known, "flow_run_id": str(run.id)}
        emit_event(
            event=EVENT,
            resource={
                "prefect.resource.id": f"mka.base-model.{change.base_model}",
                "prefect.resource.name": change.base_model,
            },
            payload=payload,
        )
    return Started(run.name, str(run.id), is_new, run.state.name if run.state else "unknown", attempt)


def has_broken(state: Any) -> bool:
    """Whether a run ended without an answer, so that another may come to one."""
    return state is not None and (state.is_crashed() or (state.is_failed() and state.name != REFUSED))
