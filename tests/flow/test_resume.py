"""Killed, and run again: what was finished is kept, what was not leaves nothing that looks finished."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.flow


def start(project, log: Path) -> subprocess.Popen:
    """Start the flow in a process group of its own."""
    environment = {**os.environ, "MKA_WORK": str(project.work), "PREFECT_HOME": str(project.folder / "prefect")}
    command = [sys.executable, "-m", "flows.recompress", str(project.write_recipe())]
    # Not a pipe: the server would keep it open after the flow is killed.
    with log.open("w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def wait_for(stage: str, project, process: subprocess.Popen, log: Path) -> psutil.Process:
    """Wait until a stage is stored; return the run's temporary Prefect server."""
    deadline = time.monotonic() + 120
    while not list((project.work / "stages").glob(f"{stage}-*/stage.json")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    (note,) = (project.folder / "prefect").glob("temporary/*.json")
    return psutil.Process(json.loads(note.read_text())[1][0])


@pytest.mark.timeout(300)
def test_a_killed_run_resumes_where_it_was(project):
    """It cannot end its server: the next run in the same Prefect home does."""
    log = project.folder / "log.txt"
    process = start(project, log)
    server = wait_for("score", project, process, log)
    process.kill()
    process.wait(30)
    assert server.is_running()

    for manifest in (project.work / "stages").glob("*/stage.json"):
        body = json.loads(manifest.read_text())
        assert all((manifest.parent / name).is_file() for name in body["files"])

    process = start(project, log)
    try:
        assert process.wait(150) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    stages = project.last_run["stages"]
    assert stages["observe"]["reused"] and stages["score"]["reused"]
    said = log.read_text()
    assert "gate: pass" in said
    # Prefect's own log stays on the run's page; the terminal shows stages.
    assert "Task run" not in said and "Traceback" not in said
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running()


def test_importing_the_flow_is_light():
    """Torch, MLflow and Great Expectations load when a stage needs them, not when a flow is listed or scheduled."""
    heavy = "('torch', 'mlflow', 'great_expectations')"
    code = f"import sys, flows.recompress; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.timeout(300)
def test_a_run_that_is_ended_leaves_no_server_and_says_how_to_go_on(project):
    log = project.folder / "log.txt"
    process = start(project, log)
    server = wait_for("observe", project, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130, log.read_text()
    said = log.read_text()
    assert "finished stages are kept; resume: mka run " in said.splitlines()[-1]
    assert "Traceback" not in said
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running()
