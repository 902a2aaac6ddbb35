"""The way to MLflow: which store, a client that fails in seconds, and the names things have there."""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from filelock import FileLock

from mka.errors import RegistryError
from mka.outside.printable import hide_passwords
from mka.recipe import Recipe
from mka.store.publishing import replace_file
from tasks.machine.slots import hold_slot, registry_slot
from tasks.machine.workplace import Workplace

EXPERIMENT = "mka"
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
# Tag of versions that hold every file and are named.
COMPLETE = "mka.complete"
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")
# For so long a store that is a file may be held by somebody else; MLflow's own patience is 20 s.
HELD_SECONDS = 120
# Stores whose tables this process knows to be there.
_OPENED: set[str] = set()


def registry_address(place: Workplace, recipe: Recipe | None = None) -> str:
    """Return the MLflow store: the recipe's, else the one `MLFLOW_TRACKING_URI` names, else that of the work folder."""
    named = recipe.registry.tracking_uri if recipe else None
    return named or os.environ.get("MLFLOW_TRACKING_URI") or place.tracking_uri


def find_database(uri: str) -> Path | None:
    """Return the file of a store on this machine; None if the store is anything but a SQLite file."""
    found = _SQLITE.match(uri)
    return Path(found["path"]) if found and found["path"] != ":memory:" else None


def refuse_password(uri: str | None, option: str) -> None:
    """Refuse an address that would be kept, password and all, among the parameters of a flow run.

    Raises:
        RegistryError: saying where a password belongs.
    """
    if uri is not None and hide_passwords(uri) != uri:
        raise RegistryError(
            f"{option} {uri} holds a password, which would be kept with the run; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or name the store in MLFLOW_TRACKING_URI"
        )


@contextmanager
def hold_registered(uri: str, model: str, purpose: str) -> Iterator[None]:
    """Wait until nobody else does the same with a registered model, and keep others waiting.

    On a store that is a file the lock lies beside it, so whoever uses that file is held. On a server it is a slot
    (`tasks.machine.slots`): of all machines that use one Prefect server, or of this machine.

    Args:
        uri: the store.
        model: registered model.
        purpose: "registration" or "promotion".

    Raises:
        RegistryError: if the lock cannot be written.
    """
    if (database := find_database(uri)) is None:
        with hold_slot(registry_slot(purpose, model), room=1):
            yield
        return
    with _hold_file(database, f"{purpose}-{re.sub(r'[^A-Za-z0-9.-]+', '-', model)}"):
        yield


@contextmanager
def _hold_file(database: Path, name: str) -> Iterator[None]:
    lock = FileLock(database.with_name(f".{database.name}.{name}.lock"))
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise RegistryError(
            f"registry {database} cannot be locked: {error.strerror or error}; make its folder writable, or name "
            "another in registry.tracking_uri or MLFLOW_TRACKING_URI"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def connect_registry(uri: str) -> Iterator[Any]:
    """Yield an MLflow client on a store; MLflow's own functions use it too until the end. Not to be nested.

    A store that is a file is made by one process while the others wait: MLflow's own tables take turns, what it writes
    into them first does not. One that somebody holds is waited for.

    Raises:
        RegistryError: if it cannot be reached.
    """
    # Fail in seconds, not after MLflow's default of minutes of back-off.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # It prints the store's address, password and all.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    import mlflow
    from sqlalchemy.exc import SQLAlchemyError

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with _restore_environment("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        untouched = "; nothing was changed there"
        try:
            _wait_for(uri)
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            client = _open_client(uri)
            untouched = ""
            yield client
        except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError) as error:
            reason = hide_passwords(" ".join(str(error).split()))[:200]
            asks = getattr(error, "error_code", "") == "UNAUTHENTICATED"
            advice = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if asks else "Start it"
            raise RegistryError(
                f"registry {uri} cannot be used: {reason}{untouched}. {advice}, or name another in "
                f"registry.tracking_uri or MLFLOW_TRACKING_URI"
            ) from None
        finally:
            mlflow.set_tracking_uri(None)
            mlflow.set_registry_uri(None)


def _wait_for(uri: str) -> None:
    """Wait until nobody else holds a store that is a file, for so long as somebody may; then it is MLflow's to fail."""
    database = find_database(uri)
    if database is None or not database.exists() or not os.access(database, os.W_OK):
        return
    deadline = time.monotonic() + HELD_SECONDS
    while time.monotonic() < deadline:
        # A second at a time: SQLite does not hear ^C while it waits.
        with closing(sqlite3.connect(database, isolation_level=None, timeout=1.0)) as connection:
            try:
                connection.execute("begin immediate")
                connection.execute("rollback")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    return
            except sqlite3.DatabaseError:  # no database: MLflow says so
                return


def _open_client(uri: str) -> Any:
    """Make a client; where the store is a file its tables are made first, once per process, by one at a time."""
    import mlflow

    database = find_database(uri)
    if database is None or (uri in _OPENED and database.exists()):
        return mlflow.MlflowClient(uri, uri)
    # One that is there may be read where nothing can be written.
    makes = not database.exists() or os.access(database.parent, os.W_OK)
    with _hold_file(database, "tables") if makes else nullcontext():
        if not database.exists():
            _make_database(uri, database)
        client = _touch_tables(uri)
    _OPENED.add(uri)
    return client


def make_tables(uri: str) -> None:
    """Make the tables of a store that is a file, unless it has them.

    Raises:
        RegistryError: if it cannot be used.
    """
    with connect_registry(uri):
        pass


def _make_database(uri: str, database: Path) -> None:
    """Have MLflow make its tables aside, and put the file in its place when they are whole.

    It makes them step by step, and goes on with none that a kill has left half done.
    """
    for left in database.parent.glob(f".{database.name}.partial-*-journal"):
        left.unlink(missing_ok=True)
    start, end = _SQLITE.match(uri).span("path")  # type: ignore[union-attr]
    replace_file(database, lambda aside: _touch_tables(f"{uri[:start]}{aside}{uri[end:]}"))


def _touch_tables(uri: str) -> Any:
    import mlflow

    client = mlflow.MlflowClient(uri, uri)
    client.search_registered_models(max_results=1)
    client.search_experiments(max_results=1)
    return client


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


def find_page(uri: str, route: str) -> str | None:
    """Return the address of a page of the registry, if that is a server; MLflow's default view is one of agents."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return None
    # A page is passed on: whatever stands before the host's @ stays here.
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/#/{route}?workflowType=machine_learning"


def find_version_page(uri: str, model: str, version: str) -> str | None:
    """Return the address of a version's page, if the registry is a server."""
    return find_page(uri, f"models/{quote(model, safe='')}/versions/{version}")


def registered_address(name: str, version: str) -> str:
    """Address under which MLflow loads a version, the same for ever: what an alias names moves with the next run."""
    return f"models:/{name}/{version}"
