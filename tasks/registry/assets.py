"""Assets of Prefect: which base a candidate was made from, and which candidate became champion."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.assets import Asset, AssetProperties, materialize
from prefect.cache_policies import NO_CACHE

from tasks.registry.promotion import Move
from tasks.registry.tracking import CANDIDATE, CHAMPION, find_version_page
from tasks.stages import Run


def base_key(label: str) -> str:
    """Name a base model as an asset."""
    return _as_key(f"mka://bases/{label}")


def model_key(model: str, alias: str) -> str:
    """Name what an alias of a registered model stands for as an asset."""
    return _as_key(f"mka://models/{model}/{alias}")


def note_candidate(run: Run, uri: str, version: str, told: str) -> None:
    """Note that a base became the candidate of its registered model.

    Args:
        run: the flow run.
        uri: the MLflow store.
        version: what was registered.
        told: what the gate found, in one line.
    """
    job = run.job
    name, base = job.recipe.registered_name, job.recipe.model.label
    source = Asset(key=base_key(base), properties=AssetProperties(name=base, description="base model"))
    facts = {"version": version, "base": base, "base revision": job.revision, "gate": told}
    _note(name, CANDIDATE, version, uri, "registered last", [source], facts)


def note_champion(uri: str, move: Move) -> None:
    """Note that a candidate, or the champion before, became champion."""
    source = model_key(move.model, CANDIDATE) if move.action == "promote" else model_key(move.model, "previous")
    facts = {"version": move.new, "before": move.old, "who": move.who, "why": move.why}
    _note(move.model, CHAMPION, move.new, uri, "in use", [Asset(key=source)], facts)


def _note(
    model: str,
    alias: str,
    version: str,
    uri: str,
    description: str,
    made_from: Sequence[Asset],
    facts: Mapping[str, Any],
) -> None:
    """Materialize what an alias stands for, as a task of its own in the graph."""
    properties = AssetProperties(
        name=f"{model}, {alias}", description=description, url=find_version_page(uri, model, version)
    )
    asset = Asset(key=model_key(model, alias), properties=properties)
    title = f"{alias}: {model} version {version}"

    @materialize(asset, by="mka", name="asset", task_run_name=title, asset_deps=[*made_from], cache_policy=NO_CACHE)
    def note() -> None:
        asset.add_metadata(dict(facts))

    note()


def _as_key(address: str) -> str:
    """Replace what Prefect takes no key with; a path keeps its names."""
    return re.sub(r"[^A-Za-z0-9._/@:=+,-]+", "-", re.sub(r"(?<!:)/{2,}", "/", address))[:512]
