"""Servers that die in the middle of a run, for good or for a moment: it goes on, or ends in one line and is resumed."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from support.project import Project
from support.servers import LOCAL, ROOT, SECONDS, free_port, run_module

pytestmark = [pytest.mark.operations, pytest.mark.timeout(4 * SECONDS)]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def environment(project, tmp_path):
    """Servers on ports of their own, and what a run needs to find them."""
    ports = {name: str(free_port()) for name in ("MKA_PREFECT_PORT", "MKA_MLFLOW_PORT")}
    found = os.environ | ports | {"MKA_WORK": str(project.work), "PREFECT_HOME": str(tmp_path / "prefect")}
    found |= {"NO_PROXY": ",".join(LOCAL), "PREFECT_API_URL": f"http://127.0.0.1:{ports['MKA_PREFECT_PORT']}/api"}
    found |= {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['MKA_MLFLOW_PORT']}"}
    run_module(found, "flows.servers", "up")
    yield found
    run_module(found, "flows.servers", "down")


def kill_server(project, name: str) -> None:
    servers = json.loads((project.work / "servers" / "servers.json").read_text())
    process = psutil.Process(next(server["pid"] for server in servers if server["name"] == name))
    for member in [*process.children(recursive=True), process]:
        member.kill()


def start_run(environment, recipe) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.recompress", str(recipe)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def wait_for_stage(project, running, stage: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not list((project.work / "stages").glob(f"{stage}-*")):
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("returns", ["at once", "afterwards"])
@pytest.mark.parametrize("name", ["mlflow", "prefect"])
def test_a_run_whose_server_dies_goes_on_or_ends_in_one_line_and_is_resumed(
    project, environment, capsys, name, returns
):
    recipe = project.write_recipe()
    running = start_run(environment, recipe)
    wait_for_stage(project, running, "plan")
    kill_server(project, name)
    if returns == "at once":
        run_module(environment, "flows.servers", "up")
    said, refused = running.communicate(timeout=SECONDS)
    code = running.returncode
    assert "Traceback" not in said + refused, refused
    if code:
        assert code == 2 and refused.strip().splitlines()[-1].startswith("recompress: "), refused
        assert "run the same command again" in refused or "resume: mka run" in refused
    if returns == "afterwards":
        run_module(environment, "flows.servers", "up")
    again = start_run(environment, recipe)
    _, complained = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, complained
    from mlflow import MlflowClient

    versions = MlflowClient(environment["MLFLOW_TRACKING_URI"]).search_model_versions("name = 'tiny'")
    assert [version.tags.get("mka.complete") for version in versions] == ["true"]
    with capsys.disabled():
        last = refused.strip().splitlines()[-1][:200] if code else "went on"
        print(f"\n{name} died and returned {returns}: exit code {code}, {last}")
