"""The servers of `make up` and what they run, as an operator uses them: typed commands against real processes."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.operations


@pytest.fixture
def client(stack):
    from prefect.client.orchestration import SyncPrefectClient

    with SyncPrefectClient(f"{stack.prefect}/api") as made:
        yield made


def test_everything_listens_on_this_machine_only(stack):
    found = set()
    for server in json.loads((stack.work / "servers" / "servers.json").read_text()):
        process = psutil.Process(server["pid"])
        for member in [process, *process.children(recursive=True)]:
            found |= {c.laddr.ip for c in member.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert found == {"127.0.0.1"}


def test_all_deployments_are_there_and_the_watch_is_scheduled_once_somebody_switches_it_on(stack, client):
    names = {f"{client.read_flow(d.flow_id).name}/{d.name}" for d in client.read_deployments()}
    assert names == {
        "recompress/default",
        "watch-base-models/default",
        "promote/default",
        "rollback/default",
        "sweep/default",
    }
    watch = client.read_deployment_by_name("watch-base-models/default")
    assert [(s.active, s.schedule.cron) for s in watch.schedules] == [(False, "17 * * * *")]
    assert not [run for run in client.read_flow_runs() if run.deployment_id == watch.id and run.auto_scheduled]
    client.update_deployment_schedule(watch.id, watch.schedules[0].id, active=True)
    deadline = time.monotonic() + 90
    while not (runs := [r for r in client.read_flow_runs() if r.deployment_id == watch.id and r.auto_scheduled]):
        assert time.monotonic() < deadline, "the scheduler made no run of a cron schedule"
        time.sleep(1)
    assert all(run.expected_start_time.minute == 17 for run in runs)


def test_a_pushed_base_model_makes_the_watch_look_at_once(stack, client):
    watch = client.read_deployment_by_name("watch-base-models/default")
    found = client.request("POST", "/automations/filter").json()
    (automation,) = [a for a in found if a["name"] == "mka-base-model-pushed"]
    assert automation["enabled"] and automation["trigger"]["expect"] == ["base-model.pushed"]
    assert [(action["type"], action["deployment_id"]) for action in automation["actions"]] == [
        ("run-deployment", str(watch.id))
    ]


def test_the_pull_step_enters_the_checkout_of_whoever_runs_it(stack, client, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], check=True)
    # Uncommitted work counts: this is about where the file lies, not which commit it is of.
    (clone / "tasks/machine/workplace.py").write_text((ROOT / "tasks/machine/workplace.py").read_text())
    steps = client.read_deployment_by_name("recompress/default").pull_steps
    code = (
        "import asyncio, json, os, sys\n"
        "from prefect.deployments.steps.core import run_steps\n"
        "print(asyncio.run(run_steps(json.loads(sys.argv[1])))['directory'] == os.getcwd(), os.getcwd())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(steps)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1].split() == ["True", str(clone)]


def test_wrong_parameters_are_refused_before_a_run_and_a_wrong_recipe_in_one_line_of_its_log(stack, client):
    def start(*parameters):
        command = [Path(sys.executable).with_name("prefect"), "deployment", "run", "recompress/default", "--watch"]
        options = [word for parameter in parameters for word in ("--param", parameter)]
        done = subprocess.run(
            [*command, *options], cwd=ROOT, env=stack.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    before = len(client.read_flow_runs())
    assert "'recip'" in start("recip=x.yaml")
    assert "Validation failed for field 'overrides'" in start("overrides=3")
    assert len(client.read_flow_runs()) == before
    said = start('overrides={"targett.layers": 3}', f"recipe={stack.project.write_recipe()}")
    assert "targett" in said and "did you mean 'target'" in said


def test_the_worker_records_on_the_server_beside_it_and_the_same_from_a_terminal(stack):
    assert stack.facts["registry"]["tracking_uri"] == stack.mlflow
    # What was begun on the server is gone on with without it.
    assert stack.project.client.get_run(stack.facts["mlflow_run_id"]).info.artifact_uri.startswith("file://")
    again = subprocess.run(
        [sys.executable, "-m", "flows.recompress", str(stack.project.write_recipe())],
        cwd=ROOT,
        env=stack.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0 and "(already there)" in again.stdout


def test_base_candidate_and_champion_are_assets(stack):
    said = "".join(stack.watched.split())
    assert "prefect.asset.materialization.succeeded*tiny,candidate" in said
    assert "prefect.asset.materialization.succeeded*tiny,champion" in said
    assert f"prefect.asset.referenced*{stack.project.base}" in said


def test_a_completed_recompression_names_its_evidence(stack):
    said = "".join(stack.watched.split())
    assert "gate.pass" in said and "model.promoted" in said
    assert stack.facts["report"] in said and stack.facts["mlflow_run_id"] in said


def test_two_models_at_once_do_not_disturb_each_other_and_a_refusal_fails_whoever_waits(stack):
    project = stack.project
    project.teach_base_its_own_text()
    other = type(project)(project.folder / "other")
    lossy = {"gate__perplexity_recovery": 0.9, "target__layers": 3, "method__name": "reference_code"}
    recipes = {"refused": project.recipe(name="refused", **lossy), "beside": other.recipe(name="beside")}
    for name, recipe in recipes.items():
        (project.folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    with ThreadPoolExecutor(2) as pool:
        refused, beside = pool.map(stack.run_deployment, [project.folder / f"{name}.yaml" for name in recipes])

    assert beside.returncode == 0, beside.stdout + beside.stderr
    assert "gate.pass" in beside.stdout and "beside" in stack.read_aliases()
    assert "Traceback" not in refused.stdout + refused.stderr
    said = "".join((refused.stdout + refused.stderr).split())
    assert refused.returncode == 1, said
    assert "Flowrunfinishedinstate'Refused'" in said and "perplexitywords0." in said
    assert "gate.fail" in said and "gaterefusedrefused;nothingwasregistered" in said
    assert "refused" not in stack.read_aliases()
    (report,) = {Path(found) for found in re.findall(r"evidencein(\S+?report\.html)andMLflowrun", said)}
    assert report.is_file() and report.is_relative_to(project.work)


def test_a_job_of_ci_has_stages_result_and_outputs_from_the_server(stack, tmp_path):
    files = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"), "GITHUB_OUTPUT": str(tmp_path / "output")}
    command = [sys.executable, "-m", "flows.ci", str(stack.project.write_recipe())]
    # Nothing of the work folder: the worker may be on another machine.
    environment = stack.environment | files | {"MKA_WORK": str(tmp_path / "empty")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stages = list(stack.facts["stages"])
    told = [line for line in done.stderr.splitlines() if line.startswith(tuple(f"{name}  " for name in stages))]
    assert len(told) == len(stages) and "verdict      pass" in done.stdout and "perplexity" in done.stdout
    outputs = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
    assert outputs["verdict"] == "pass" and outputs["address"] == f"models:/tiny/{outputs['version']}"
    assert outputs["run"].startswith(stack.prefect) and "perplexity" in (tmp_path / "summary.md").read_text()


def test_up_again_starts_nothing_and_down_ends_exactly_what_up_started(stack, tmp_path):
    def run(action, **environment):
        command = [sys.executable, "-m", "flows.servers", action]
        return subprocess.run(
            command, cwd=ROOT, env={**stack.environment, **environment}, capture_output=True, text=True, timeout=300
        )

    before = json.loads((stack.work / "servers" / "servers.json").read_text())
    assert run("up").returncode == 0
    assert json.loads((stack.work / "servers" / "servers.json").read_text()) == before

    # Another work folder that wants the same port is refused and ends nothing.
    other = run("up", MKA_WORK=str(tmp_path / "other"))
    assert other.returncode == 2
    port = stack.prefect.rpartition(":")[2]
    assert other.stderr.startswith(f"servers: prefect: something else listens on 127.0.0.1:{port}; stop it, or set")
    assert run("down", MKA_WORK=str(tmp_path / "other")).stdout == "nothing runs\n"

    record = stack.work / "servers" / "servers.json"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        try:
            # A process that has got the number of one that is gone is not ours.
            stranger = {**before[0], "name": "stranger", "pid": bystander.pid}
            record.write_text(json.dumps([*before, stranger]))
            done = run("down")
            assert done.returncode == 0 and bystander.poll() is None
        finally:
            bystander.kill()
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == ["mlflow", "prefect", "worker"]
    assert not any(psutil.pid_exists(server["pid"]) for server in before)
    assert run("status").stdout == "nothing runs\n"
