"""One Prefect server for all flow tests, and a small project folder for each."""

import os
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


def pytest_sessionfinish():
    # What is still queued goes to a server that is gone by now.
    stop_sending(0)


@pytest.fixture(scope="session")
def prefect_server():
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def project(tmp_path, monkeypatch):
    made = Project(tmp_path)
    monkeypatch.setenv("MKA_WORK", str(made.work))
    # MLflow leaves the store it was set to there, and a run would take it for the user's wish.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made
