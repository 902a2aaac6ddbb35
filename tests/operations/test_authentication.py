"""Passwords of servers: who gives none is refused, whoever has one shows it to nobody."""

import base64
import os
import subprocess
import sys
import urllib.error
import urllib.request

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
