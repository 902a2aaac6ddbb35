"""One Prefect server for all flow tests, and a small project folder for each."""

import os
import shutil
import tempfile

# Before anything imports Prefect: its settings are read once.
_HOME = tempfile.mkdtemp(prefix="mka-prefect-")
os.environ["PREFECT_HOME"] = _HOME
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"

import pytest
from support.project import Project

from flows.command_line import stop_sending
from tasks.registry.tracking import connect_registry


def pytest_sessionfinish():
    # What is still queued goes to a server that is gone by now.
    stop_sending(0)


@pytest.fixture(scope="session")
def prefect_server():
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """MLflow's tables, made once: its fifty migrations take longer than most of what is tested here."""
    store = tmp_path_factory.mktemp("store") / "mlflow.db"
    with connect_registry(f"sqlite:///{store}"):
        return store


@pytest.fixture(autouse=True)
def no_store_of_other_tests(monkeypatch):
    """MLflow leaves the store it was set to in the environment, and a run would take it for the user's wish."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that what a test leaves there goes with it
    monkeypatch.delenv("MLFLOW_TRACKING_URI")


@pytest.fixture
def project(tmp_path, monkeypatch, empty_store):
    made = Project(tmp_path)
    made.work.mkdir(0o700)
    shutil.copyfile(empty_store, made.work / empty_store.name)
    monkeypatch.setenv("MKA_WORK", str(made.work))
    return made
