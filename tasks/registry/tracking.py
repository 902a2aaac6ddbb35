"""The way to MLflow: which store, a client that fails in seconds, and the names things have there."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mka.errors import RegistryError
from mka.recipe import Recipe
from tasks.machine.workplace import Workplace

EXPERIMENT = "mka"
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
# Tag of versions that hold every file and are named.
COMPLETE = "mka.complete"


def registry_address(place: Workplace, recipe: Recipe | None = None) -> str:
    """Return the MLflow store: the recipe's, else the one `MLFLOW_TRACKING_URI` names, else that of the work folder."""
    named = recipe.registry.tracking_uri if recipe else None
    return named or os.environ.get("MLFLOW_TRACKING_URI") or place.tracking_uri


@contextmanager
def connect_registry(uri: str) -> Iterator[Any]:
    """Yield an MLflow client on a store; MLflow's own functions use it too until the end. Not to be nested.

    Raises:
        RegistryError: if it cannot be reached.
    """
    # Fail in seconds, not after MLflow's default of minutes of back-off.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from sqlalchemy.exc import SQLAlchemyError

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with _restore_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        try:
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            yield mlflow.MlflowClient(uri, uri)
        except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RegistryError(
                f"registry {uri} cannot be used: {reason}; nothing was changed there. Start it, or name another in "
                f"registry.tracking_uri or MLFLOW_TRACKING_URI"
            ) from None
        finally:
            mlflow.set_tracking_uri(None)
            mlflow.set_registry_uri(None)


@contextmanager
def _restore_environment(*names: str) -> Iterator[None]:
    """Undo what MLflow writes into the environment, where the next run in this process would take it for a wish."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def registered_address(name: str, alias: str = CANDIDATE) -> str:
    """Address under which MLflow loads a registered model."""
    return f"models:/{name}@{alias}"
