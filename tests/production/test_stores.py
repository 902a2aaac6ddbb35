"""A recompression against production stores: MLflow on PostgreSQL and S3, Prefect on PostgreSQL."""

import itertools
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.project import Project

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "mka-models"

pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def prefect_client(stores):
    from prefect.client.orchestration import SyncPrefectClient

    with SyncPrefectClient(f"{stores.prefect}/api", auth_string=stores.worker["PREFECT_API_AUTH_STRING"]) as client:
        yield client


@pytest.fixture(scope="module")
def deployment(prefect_client):
    """A deployment that is due every night at three."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    flow = prefect_client.create_flow_from_name("nightly")
    schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *", timezone="UTC"), active=True)
    return prefect_client.create_deployment(flow_id=flow, name="nightly", schedules=[schedule])


@pytest.fixture(scope="module")
def project(stores, deployment, tmp_path_factory):
    """The tiny project after one run with a worker's environment: it knows the two servers and no store."""
    # The deployment is made first: its runs are scheduled while this one computes.
    folder = tmp_path_factory.mktemp("project")
    made = Project(folder)
    assert not [value for value in stores.worker.values() if "postgresql" in value or "s3:" in value]
    done = subprocess.run(
        [sys.executable, "-m", "flows.recompress", str(made.write_recipe())],
        cwd=ROOT,
        env={**stores.worker, "MKA_WORK": str(made.work), "HF_HOME": str(folder / "huggingface")},
        capture_output=True,
        text=True,
    )
    logs = "\n".join(log.read_text()[-2000:] for log in stores.folder.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return made


@pytest.fixture(scope="module")
def registry(stores, project):
    import mlflow

    return mlflow.MlflowClient(stores.mlflow)


def test_the_registered_version_is_whole_and_named(registry, project):
    facts = project.last_run
    assert facts["status"] == "completed" and facts["verdict"] == "pass"
    (version,) = registry.search_model_versions("name = 'tiny'")
    assert (version.name, version.version) == (facts["registered_name"], facts["registered_version"])
    assert version.tags["mka.complete"] == "true"
    for alias in ("candidate", "champion"):
        assert registry.get_model_version_by_alias("tiny", alias).version == version.version
    run = registry.get_run(facts["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.data.metrics["candidate/layers"] == 5


def test_the_model_from_s3_is_the_candidate_that_was_measured(registry, stores, project, tmp_path):
    import mlflow

    from mka.model.checkpoint import open_checkpoint
    from tasks.registry.tracking import connect_registry

    version = registry.get_model_version_by_alias("tiny", "champion")
    with connect_registry(stores.mlflow):
        downloaded = mlflow.artifacts.download_artifacts("models:/tiny@champion", dst_path=str(tmp_path))
    (weights,) = Path(downloaded).rglob("*.safetensors")
    assert open_checkpoint(weights.parent).digest == version.tags["candidate_digest"]
    assert version.tags["candidate_digest"] == open_checkpoint(project.last_run["candidate"]).digest
    # It came out of the bucket, byte for byte, and nothing was written beside the servers' stores.
    assert registry.get_experiment_by_name("mka").artifact_location.startswith("mlflow-artifacts:")
    held = {item["Key"]: item["Size"] for item in stores.s3.list_objects_v2(Bucket=BUCKET)["Contents"]}
    (key,) = (key for key in held if key.endswith(".safetensors"))
    assert stores.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == weights.read_bytes()
    assert any(key.endswith("report.html") for key in held)
    assert not (project.work / "mlflow.db").exists() and not (project.work / "mlartifacts").exists()


def test_the_run_is_recorded_by_the_prefect_server(prefect_client, project):
    from prefect.client.schemas.filters import FlowFilter

    runs = prefect_client.read_flow_runs(flow_filter=FlowFilter(name={"any_": ["recompress"]}))
    assert [(run.name, run.state_name) for run in runs] == [(project.last_run["run"], "Completed")]


def test_a_cron_schedule_gets_its_runs(prefect_client, deployment):
    """Silently broken by SQLAlchemy 2.1: the scheduler's loop fails and nothing else does."""
    from prefect.client.schemas.filters import FlowFilter

    deadline = time.monotonic() + 90
    while True:
        runs = prefect_client.read_flow_runs(flow_filter=FlowFilter(name={"any_": ["nightly"]}))
        if len(runs) >= 3:
            break
        assert time.monotonic() < deadline, f"{len(runs)} of 3 runs were scheduled in 90 s"
        time.sleep(1)
    assert {run.state_name for run in runs} == {"Scheduled"} and {run.deployment_id for run in runs} == {deployment}
    assert all(run.auto_scheduled for run in runs)
    times = sorted(run.next_scheduled_start_time for run in runs)
    assert {(at.hour, at.minute) for at in times} == {(3, 0)}
    assert {(after - before).total_seconds() for before, after in itertools.pairwise(times)} == {86400.0}


def test_both_servers_keep_their_records_in_postgresql(stores, project):
    import psycopg

    counts = {}
    for name, table in (("mlflow", "model_versions"), ("prefect", "flow_run")):
        with psycopg.connect(f"postgresql://{stores.database}/{name}") as connection:
            (counts[name],) = connection.execute(f"select count(*) from {table}").fetchone()
    assert counts["mlflow"] == 1 and counts["prefect"] >= 1
    assert not list(stores.folder.rglob("*.db"))


def test_prefect_asks_for_its_password_and_answers_probes_without(stores):
    assert ask(f"{stores.prefect}/api/health") == 200
    assert ask(f"{stores.prefect}/api/flow_runs/count", method="POST") == 401


def test_mlflow_answers_to_the_names_it_has_and_to_no_others(stores):
    path = f"{stores.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    assert ask(path, Host="mlflow:5000") == ask(path, Host="mlflow.example.org") == ask(path) == 200
    assert ask(path, Host="attacker.example") == 403
    # Its pages ask by POST, which browsers that came from elsewhere may not.
    path = f"{stores.mlflow}/api/2.0/mlflow/runs/search"
    ours = {"Host": "mlflow.example.org", "Origin": "https://mlflow.example.org"}
    assert ask(path, method="POST", **ours) == 200
    assert ask(path, method="POST", **ours | {"Origin": "https://attacker.example"}) == 403


def ask(address: str, method: str = "GET", **headers: str) -> int:
    """Return the status of an answer."""
    body = b'{"experiment_ids": ["0"], "max_results": 1}' if method == "POST" else None
    headers |= {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, method=method, headers=headers, data=body), timeout=20
        ) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
