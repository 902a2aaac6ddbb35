"""A base model that is a version of the registry: found by its address, and brought here as a folder."""

import shutil
from pathlib import Path

from mka.errors import CheckpointError
from mka.model.checkpoint import open_checkpoint
from mka.recipe import Recipe
from mka.sources.fetch import REGISTERED_PREFIX
from mka.store.publishing import publish
from tasks.machine.workplace import Workplace
from tasks.registry.promotion import RegisteredVersion, fetch_version, find_alias, read_version
from tasks.registry.tracking import registry_address


def find_registered(place: Workplace, recipe: Recipe) -> RegisteredVersion:
    """Return the version that a recipe's base is, as its address leads there now.

    Raises:
        RegistryError: if the registry has no such model, alias or version, or did not hold it whole.
    """
    assert recipe.model.registered is not None
    uri, address = registry_address(place, recipe), recipe.model.registered.removeprefix(REGISTERED_PREFIX)
    name, _, alias = address.partition("@")
    if alias:
        return find_alias(uri, name, alias)
    name, _, version = address.partition("/")
    return read_version(uri, name, version)


def bring_registered(place: Workplace, version: RegisteredVersion) -> Path:
    """Return a folder of this machine with a version's model, compared with the digest it was registered under.

    Raises:
        RegistryError: if it cannot be had, or is altered.
        OutputError: if the work folder cannot be written.
    """
    digest = version.tags["candidate_digest"]
    folder = place.work / "models" / f"registered-{digest[:16]}"
    if folder.is_dir():
        try:
            if open_checkpoint(folder, verify=False).digest == digest:
                return folder
        except CheckpointError:
            pass  # half of it is gone: it is fetched anew
        shutil.rmtree(folder)
    with fetch_version(place, version) as held, publish(folder) as partial:
        shutil.copytree(held, partial, dirs_exist_ok=True)
    return folder
