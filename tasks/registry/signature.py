"""The signature of a registered version: kept with its run's evidence, asked for before it becomes champion."""

import tempfile
from pathlib import Path

from mka.errors import PromotionError, SignatureError
from mka.recipe import Recipe
from mka.store.signing import SIGNATURE, sign_folder, verify_folder
from tasks.machine.workplace import Workplace
from tasks.registry.promotion import RegisteredVersion, fetch_version
from tasks.registry.tracking import connect_registry

PLACE = "signature"


def sign_version(place: Workplace, version: RegisteredVersion, key: Path) -> None:
    """Sign what the registry holds of a version, and keep the signature there; an earlier one is replaced.

    Raises:
        RegistryError: if the version cannot be had, or is altered.
        SignatureError: if the key cannot sign.
    """
    with fetch_version(place, version) as folder, tempfile.TemporaryDirectory() as aside:
        made = sign_folder(folder, key, Path(aside) / SIGNATURE)
        with connect_registry(version.uri) as client:
            client.log_artifact(version.run_id, str(made), PLACE)


def require_signature(place: Workplace, recipe: Recipe, version: RegisteredVersion) -> None:
    """Refuse a version whose recipe wants a signature that is missing, or is not of what the registry holds.

    Raises:
        PromotionError: saying how to sign it.
        RegistryError: if the version cannot be had, or is altered.
    """
    key = recipe.registry.signature
    if key is None:
        return
    again = f"mka registry-sign {version.model} --version {version.version} --key PRIVATE.pem"
    with fetch_version(place, version) as folder, tempfile.TemporaryDirectory() as aside:
        with connect_registry(version.uri) as client:
            signed = any(file.path == f"{PLACE}/{SIGNATURE}" for file in client.list_artifacts(version.run_id, PLACE))
            found = client.download_artifacts(version.run_id, f"{PLACE}/{SIGNATURE}", aside) if signed else None
        if found is None:
            raise PromotionError(f"{version.label} is not signed, and registry.signature asks for it; sign it: {again}")
        try:
            verify_folder(folder, key, Path(found))
        except SignatureError as error:
            raise PromotionError(f"{version.label} is not signed by {key}: {error}; sign it: {again}") from None
