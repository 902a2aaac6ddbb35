"""Passwords of servers: who gives none is refused, whoever has one shows it to nobody."""

import base64
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from support.project import Project
from support.servers import LOCAL, ROOT, SECONDS, free_port, run_module

pytestmark = pytest.mark.operations
LOGIN = "mka:hunter2"


def read_flows(prefect, login):
    request = urllib.request.Request(f"{prefect}/api/flows/filter", b"{}", {"Content-Type": "application/json"})
    if login is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status


def test_prefect_asks_for_its_password_and_make_up_knows_it(tmp_path):
    project = Project(tmp_path)
    ports = {name: str(free_port()) for name in ("MKA_PREFECT_PORT", "MKA_MLFLOW_PORT")}
    login = {"PREFECT_SERVER_API_AUTH_STRING": LOGIN, "PREFECT_API_AUTH_STRING": LOGIN, "NO_PROXY": ",".join(LOCAL)}
    environment = (
        os.environ | ports | login | {"MKA_WORK": str(project.work), "PREFECT_HOME": str(tmp_path / "prefect")}
    )
    environment.pop("PREFECT_API_URL", None)
    try:
        said = run_module(environment, "flows.servers", "up")
        prefect = f"http://127.0.0.1:{ports['MKA_PREFECT_PORT']}"
        for wrong in (None, "mka:hunter3"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                read_flows(prefect, wrong)
            assert refused.value.code == 401
        assert read_flows(prefect, LOGIN) == 200
        logs = [file.read_bytes() for file in (project.work / "servers").iterdir() if file.is_file()]
        assert "hunter2" not in said and not any(b"hunter2" in log for log in logs)
    finally:
        run_module(environment, "flows.servers", "down")


def test_a_run_leaves_the_password_of_its_registry_nowhere(stack, tmp_path):
    project = Project(tmp_path)
    address = stack.mlflow.replace("http://", "http://mka:hunter2@")
    environment = stack.environment | {"MKA_WORK": str(project.work), "MLFLOW_TRACKING_URI": address}
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        environment.pop(name)
    recipe = project.write_recipe(name="behind-a-password")
    done = subprocess.run(
        [sys.executable, "-m", "flows.recompress", str(recipe)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "http://mka:***@127.0.0.1" in done.stdout and "View run" not in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    left = [file for folder in (project.work, stack.work) for file in folder.rglob("*") if file.is_file()]
    assert (project.work / "prefect" / "prefect.db") in left
    assert [file for file in left if b"hunter2" in file.read_bytes()] == []


@pytest.fixture
def guarded(tmp_path):
    """MLflow's own basic auth on this machine; yields its address and the environment of whoever knows the password."""
    folder, port = tmp_path / "mlflow", free_port()
    folder.mkdir()
    users = folder / "basic_auth.ini"
    settings = {"default_permission": "READ", "admin_username": "mka", "database_uri": f"sqlite:///{folder}/users.db"}
    settings["authorization_function"] = "mlflow.server.auth:authenticate_request_basic_auth"
    users.write_text("[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    secrets = {"MLFLOW_AUTH_CONFIG_PATH": str(users), "MLFLOW_AUTH_ADMIN_PASSWORD": "hunter2 and more"}
    secrets |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "only of this test", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    program = [str(Path(sys.prefix) / "bin" / "mlflow"), "server", "--app-name", "basic-auth", "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "held")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*program, "--host", "127.0.0.1", "--port", str(port), *store],
            cwd=folder,
            env=os.environ | secrets,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_mlflow_asks_for_its_password_and_a_run_gives_it(guarded, tmp_path):
    project = Project(tmp_path)
    recipe = project.write_recipe(name="behind-basic-auth")
    environment = os.environ | {"MKA_WORK": str(project.work), "MLFLOW_TRACKING_URI": guarded}
    environment |= {"NO_PROXY": ",".join(LOCAL)}
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        environment.pop(name, None)

    def run(**login):
        command = [sys.executable, "-m", "flows.recompress", str(recipe)]
        known = environment | {f"MLFLOW_TRACKING_{name.upper()}": value for name, value in login.items()}
        return subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, timeout=SECONDS)

    for login in ({}, {"username": "mka", "password": "hunter3"}):
        refused = run(**login)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        line = refused.stderr.strip().splitlines()[-1]
        assert line.startswith("recompress: registry http://127.0.0.1") and "MLFLOW_TRACKING_PASSWORD" in line, line
        assert "Traceback" not in refused.stderr and "hunter3" not in refused.stdout + refused.stderr
        assert not list((project.work / "stages").glob("merge-*"))  # asked before anything was computed
    done = run(username="mka", password="hunter2 and more")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hunter2" not in done.stdout + done.stderr
    assert [f for f in project.work.rglob("*") if f.is_file() and b"hunter2" in f.read_bytes()] == []
    assert project.last_run["registered_version"] == "1"
