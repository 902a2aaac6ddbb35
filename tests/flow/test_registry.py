"""The registry holds what was measured, knows no password, and takes nobody's word for a verdict."""

import base64
import json
import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from support.models import make_texts

from mka.errors import CalibrationError, RegistryError
from mka.texts.rows import digest_sources, format_rows, read_heldout, text_digest

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def without_retries(monkeypatch):
    from tasks.registry import record

    monkeypatch.setattr(record.register, "retries", 0)


def versions(project):
    return project.client.search_model_versions("name = 'tiny'")


def last_line(capsys):
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def promote(*arguments):
    from flows.promote import main

    return main(["tiny", "--because", "evidence read", *arguments])


def rewrite_gate(project, verdict):
    """Write another verdict into the stored gate, as somebody might who cannot wait."""
    (manifest,) = project.work.glob("stages/gate-*/stage.json")
    body = json.loads(manifest.read_text())
    body["facts"]["verdict"] = verdict
    for check in body["facts"]["checks"]:
        check["verdict"] = verdict
    manifest.write_text(json.dumps(body, indent=2))


def read_logs():
    """What Prefect's server keeps of the newest runs' logs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import LogSort
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()
    with get_client(sync_client=True) as client:
        return [log.message for log in client.read_logs(limit=200, sort=LogSort.TIMESTAMP_DESC)]


def leave_aside(project):
    """Leave what a process leaves that is killed while it sends a candidate; one that lives is not disturbed."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    folder = project.work / "registry"
    gone, lives = (folder / f".send@{socket.gethostname()}@{pid}-abcd12_x" for pid in (ended.pid, os.getppid()))
    for left in (gone, lives):
        left.mkdir(parents=True)
    return lives


def begin_run(project, name, **tags):
    """Leave what a killed recompression leaves: a run that nobody ends."""
    from tasks.registry.opened import REGISTERS
    from tasks.registry.tracking import EXPERIMENT, connect_registry

    project.work.mkdir(exist_ok=True)
    with connect_registry(f"sqlite:///{project.work / 'mlflow.db'}") as client:
        found = client.get_experiment_by_name(EXPERIMENT)
        kept = (project.work / "mlartifacts").as_uri()
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, kept)
        return client.create_run(experiment, tags={REGISTERS: name, **tags}).info.run_id


def test_a_run_that_was_killed_while_it_registered_is_ended_and_the_store_stays_as_it_was(project):
    left, other = begin_run(project, "tiny"), begin_run(project, "other")
    sent = leave_aside(project)
    assert project.run() == 0
    assert project.client.get_run(left).info.status == "KILLED"
    assert project.client.get_run(other).info.status == "RUNNING"

    candidate = Path(project.last_run["candidate"])
    listed = set(json.loads((candidate.parent / "stage.json").read_text())["files"])
    assert {f"model/{file.name}" for file in candidate.iterdir()} == listed
    model_id = versions(project)[0].source.rpartition("/")[2]
    (held,) = project.work.rglob(f"{model_id}/artifacts/artifacts/model")
    assert {file.name for file in held.iterdir()} == {file.name for file in candidate.iterdir()} | {"README.md"}
    assert list((project.work / "registry").iterdir()) == [sent]


def own_process(**changes):
    """The tags of a run that a living process on this machine fills, which is not this one's."""
    from tasks.registry.opened import PROCESS

    mine = psutil.Process(os.getppid())
    told = {"pid": mine.pid, "created": mine.create_time(), "host": socket.gethostname()} | changes
    return {PROCESS: f"{told['pid']} {told['created']} {told['host']}"}


def test_a_run_that_somebody_still_fills_is_left_alone_and_one_of_another_machine_until_its_flow_run_ended(project):
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed, Running

    from tasks.registry.opened import FLOW_RUN

    @flow
    def elsewhere():
        pass

    with get_client(sync_client=True) as client:
        ended, going = (client.create_flow_run(elsewhere, state=state) for state in (Crashed(), Running()))
    living = begin_run(project, "tiny", **own_process())
    reused = begin_run(project, "tiny", **own_process(created=1.0))
    left, others = (
        begin_run(project, "tiny", **own_process(host="elsewhere"), **{FLOW_RUN: str(run.id)}) for run in (ended, going)
    )
    assert project.run() == 0
    states = {run: project.client.get_run(run).info.status for run in (living, reused, left, others)}
    assert states == {living: "RUNNING", reused: "KILLED", left: "KILLED", others: "RUNNING"}


def runs(project):
    """Every run of the store that nobody removed, oldest first."""
    experiment = project.client.get_experiment_by_name("mka")
    return project.client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def test_a_run_is_there_before_anything_is_computed_and_says_how_it_ended(project, capsys, monkeypatch):
    import flows.recompress

    assert project.run(target__layers=99) == 2
    (refused,) = runs(project)
    assert refused.info.status == "FAILED" and "allowed: 1 to 6" in refused.data.tags["mlflow.note.content"]
    assert refused.info.run_name == project.last_run["run"]
    assert refused.data.tags["mlflow.source.name"] == project.last_run["command"]

    seen = []

    def interrupt(*arguments):
        seen.extend(run.info.status for run in runs(project))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(flows.recompress, "fetch_base_model", interrupt)
        assert project.run() == 130
    assert seen == ["FAILED", "RUNNING"]
    assert [run.info.status for run in runs(project)] == ["FAILED", "KILLED"]

    # What is found in the registry has a run already.
    for _ in range(2):
        assert project.run() == 0
        assert [run.info.status for run in runs(project)] == ["FAILED", "KILLED", "FINISHED"]
    assert runs(project)[-1].info.run_id == project.last_run["mlflow_run_id"]


def test_pages_of_the_registry_say_what_came_out_and_whose_figures_are_whose(project):
    assert project.run(name="ti.ny", registry__name="ti ny") == 0
    (version,) = project.client.search_model_versions("name = 'ti ny'")
    recorded = project.client.get_run(version.run_id)
    notes = (
        version.description,
        project.client.get_registered_model("ti ny").description,
        recorded.data.tags["mlflow.note.content"],
    )
    for note in notes:
        (row,) = [line for line in note.splitlines() if line.startswith("| layers ")]
        assert [cell.strip() for cell in row.strip("|").split("|")] == ["layers", "6", "6", "5", f"{5 / 6:.3f}"]
        assert f"`{project.last_run['command']}`" in note
    logged = project.client.get_logged_model(version.source.rpartition("/")[2])
    assert logged.name == "ti-ny-5-of-6-layers-int8" and logged.tags["mlflow.note.content"] == version.description
    for tags in (recorded.data.tags, logged.tags):
        assert tags["mlflow.source.name"] == project.last_run["command"]
        assert version.tags["code_commit"].startswith(tags["mlflow.source.git.commit"])
    (table,) = [
        item.dataset
        for item in recorded.inputs.dataset_inputs
        if any(tag.value == "evaluation" for tag in item.tags if "context" in tag.key)
    ]
    owned = {metric.key: metric.dataset_digest for metric in logged.metrics}
    assert owned["candidate/words/perplexity"] == table.digest and owned["layer_ratio"] is None
    assert {name.split("/")[0] for name in owned} == {"candidate", "gate", "layer_ratio", "size_ratio"}
    assert {"base/words/perplexity", "control/words/perplexity"} <= set(recorded.data.metrics)
    experiment = project.client.get_experiment_by_name("mka")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_run_tells_what_the_machine_did_meanwhile(project, monkeypatch):
    from tasks.registry import opened

    monkeypatch.setattr(opened, "SAMPLE_SECONDS", 0.2)
    assert project.run() == 0
    metrics = project.client.get_run(project.last_run["mlflow_run_id"]).data.metrics
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100
    assert metrics["system/cpu_utilization_percentage"] >= 0


def test_a_registration_that_is_tried_again_goes_on_with_its_own_run_and_version(project, monkeypatch):
    from tasks.registry import record

    complete, failures = record._complete, iter([RegistryError("gone for a moment")])

    def fail_once(*arguments):
        for failure in failures:
            raise failure
        return complete(*arguments)

    monkeypatch.setattr(record, "_complete", fail_once)
    monkeypatch.setattr(record.register, "retry_delay_seconds", 0)
    assert project.run() == 0
    (version,), (recorded,) = versions(project), runs(project)
    assert version.run_id == recorded.info.run_id == project.last_run["mlflow_run_id"]
    assert recorded.info.status == "FINISHED" and version.tags["mka.complete"] == "true"


def test_a_registry_on_a_server_is_shown_by_pages_of_models_not_of_agents():
    from tasks.registry.tracking import find_page, find_version_page

    assert find_page("sqlite:////x/mlflow.db", "experiments") is None
    page = "https://host:1/mlflow/#/models/a%20b/versions/3?workflowType=machine_learning"
    assert find_version_page("https://me:hunter2@host:1/mlflow/", "a b", "3") == page


@pytest.mark.parametrize("alter", ["flip", "lose"])
def test_what_changes_on_its_way_to_the_registry_is_removed_there(project, monkeypatch, capsys, without_retries, alter):
    import mlflow

    send = mlflow.register_model

    def alter_and_send(address, name, **options):
        (held,) = project.work.glob("mlartifacts/**/artifacts/model/model.safetensors")
        data = bytearray(held.read_bytes())
        data[-1] ^= 1
        held.write_bytes(data) if alter == "flip" else held.unlink()
        return send(address, name, **options)

    monkeypatch.setattr(mlflow, "register_model", alter_and_send)
    assert project.run() == 2
    line = last_line(capsys)
    assert "tiny version 1 is not what was registered" in line and "the version was removed again" in line
    assert versions(project) == [] and not project.client.get_registered_model("tiny").aliases


def test_a_verdict_written_into_the_store_promotes_nothing(project, capsys):
    assert project.run(gate__perplexity_recovery=0.999, target__layers=4) == 3
    assert project.last_run["verdict"] == "undecided"
    rewrite_gate(project, "pass")
    assert promote() != 0
    assert "gate" in last_line(capsys)
    assert project.run(gate__perplexity_recovery=0.999, target__layers=4) != 0 or (
        project.last_run["verdict"] == "undecided"
    )
    assert set(project.client.get_registered_model("tiny").aliases) == {"candidate"}


def test_a_failed_verdict_that_is_written_over_registers_nothing(project, capsys):
    project.teach_base_its_own_text()
    changes = {"gate__perplexity_recovery": 0.9, "target__layers": 3, "method__name": "reference_code"}
    assert project.run(**changes) == 1
    rewrite_gate(project, "pass")
    assert project.run(**changes) != 0
    assert "gate" in last_line(capsys)
    assert versions(project) == []


@pytest.mark.parametrize("place", ["MLFLOW_TRACKING_URI", "registry.tracking_uri", "--registry"])
def test_a_password_in_an_address_reaches_nothing(project, monkeypatch, capfd, place):
    address = "http://mka:hunter2@127.0.0.1:9"
    if place == "registry.tracking_uri":
        assert project.run(registry__tracking_uri=address) == 2
    elif place == "--registry":
        assert promote("--registry", address) == 2
    else:
        monkeypatch.setenv(place, address)
        assert project.run() == 2
    out, err = capfd.readouterr()
    assert "hunter2" not in out + err and len(err.strip().splitlines()[-1]) > 20
    kept = [file for file in project.work.rglob("*") if file.is_file()] if project.work.exists() else []
    assert [file for file in kept if b"hunter2" in file.read_bytes()] == []
    if place == "MLFLOW_TRACKING_URI":
        logged = read_logs()
        assert any("cannot be used" in line for line in logged) and not any("hunter2" in line for line in logged)
        assert "registry http://mka:***@127.0.0.1:9 cannot be used" in project.last_run["error"]


def test_what_a_run_keeps_of_its_registry_has_no_password(project):
    from tasks.registry.record import Registration, as_facts

    made = Registration("postgresql://mka:hunter2@db/mlflow", "1", "tiny", "1", (), False)
    assert as_facts(made)["tracking_uri"] == "postgresql://mka:***@db/mlflow"
    assert made.tracking_uri.startswith("postgresql://mka:hunter2@")


@pytest.fixture
def asking_registry():
    """The address of a server that answers as MLflow's does behind its basic auth, to mka:hunter2 alone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = b"Basic " + base64.b64encode(b"mka:hunter2") == self.headers.get("Authorization", "").encode()
            body = b"{}" if known else b"You are not authenticated."
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_registry_that_asks_who_is_there_is_told_by_the_environment_or_refused_in_one_line(
    project, monkeypatch, asking_registry
):
    from tasks.registry.tracking import connect_registry

    def reach(address):
        with connect_registry(address) as client:
            return list(client.search_registered_models(max_results=1))

    with pytest.raises(RegistryError, match=r"cannot be used: .*(not authenticated|401)"):
        reach(f"http://{asking_registry}")
    with pytest.raises(RegistryError) as refused:
        reach(f"http://mka:hunter3@{asking_registry}")
    assert "hunter3" not in str(refused.value) and "\n" not in str(refused.value)
    assert reach(f"http://mka:hunter2@{asking_registry}") == []
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "mka")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    assert reach(f"http://{asking_registry}") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registry__name": "a/b"}, "registry.name 'a/b' cannot be registered"),
        ({"registry__name": "a@b"}, "registry.name 'a@b' cannot be registered"),
        ({"registry__name": "it's"}, "cannot be registered"),
        ({"registry__name": ".."}, "cannot be registered"),
    ],
)
def test_names_that_mlflow_refuses_are_refused_first(project, capsys, changes, message):
    assert project.run(**changes) == 2
    assert message in last_line(capsys)
    assert project.last_run.get("stages") is None


@pytest.mark.parametrize(
    ("source", "message"),
    [("a;b", "source 'a;b' cannot be part of a metric's name"), ("x" * 240, "at most 200 long")],
)
def test_sources_that_mlflow_refuses_are_refused_before_anything_is_computed(project, capsys, source, message):
    project.write_rows(project.heldout, ["some text"], source)
    assert project.run() == 2
    assert message in last_line(capsys)
    assert set(project.last_run["stages"]) == {"base model"}


def test_an_index_without_its_columns_is_refused_before_anything_is_computed(project, capsys):
    index = project.write_rows(project.folder / "index.jsonl", ["some text"], "words")
    assert project.run(evaluation__overlap_index=str(index)) == 2
    assert "index.jsonl, row 1: nothing in task, id, field, text_sha256" in last_line(capsys)
    assert set(project.last_run["stages"]) == {"base model"}


def test_tables_of_one_name_plain_text_and_marked_ones_are_each_read_as_what_they_are(project, capfd):
    # Texts with control characters, and a mark of the byte order in front.
    calibration = project.folder / "cal.txt"
    calibration.write_text("\ufeff" + "\n\n".join("\x07" + text for text in make_texts(60, seed=1)))
    heldout, index = project.folder / "b" / "rows.jsonl", project.folder / "c" / "rows.jsonl"
    for file in (heldout, index):
        file.parent.mkdir()
    heldout.write_text("\ufeff" + project.heldout.read_text())
    texts = make_texts(40, seed=3)
    index.write_text(
        format_rows(
            {"task": "words", "id": str(number), "field": "question", "text": text, "text_sha256": text_digest(text)}
            for number, text in enumerate(texts)
        )
    )
    where = {"calibration__path": calibration, "evaluation__text": heldout, "evaluation__overlap_index": index}
    assert project.run(**{key: str(path) for key, path in where.items()}) == 0
    (run,) = [project.client.get_run(version.run_id) for version in versions(project)]
    named = {item.dataset.digest: item.dataset.source for item in run.inputs.dataset_inputs}
    assert len(named) == 2
    for manifest in project.work.glob("stages/evaluate-*/stage.json"):
        body = json.loads(manifest.read_text())
        assert body["inputs"]["heldout"] == digest_sources(read_heldout(heldout))
    out, err = capfd.readouterr()
    pages = [project.work / "index.html", *project.work.rglob("report.html"), *project.work.rglob("README.md")]
    for text in (out, err, *(page.read_text() for page in pages)):
        assert not set("\x1b\x07\u202e") & set(text)


def test_a_table_that_changes_after_its_digest_was_taken_is_refused(project):
    from tasks.machine.workplace import find_workplace
    from tasks.versioned import copy_tables, resolve_versions

    place = find_workplace()
    taken = resolve_versions(place, [project.heldout], None)
    project.write_rows(project.heldout, ["other text"], "words")
    with pytest.raises(CalibrationError, match=r"is not what it was a moment ago.*run again"):
        copy_tables(place, taken)
    assert list(place.stages.glob("tables-*")) == []


def test_a_base_may_be_a_version_of_the_registry(project, capsys):
    whole = {"quantize__scheme": "off", "gate__champion_recovery": 0.01}
    assert project.run(name="parent", **whole) == 0
    parent = project.client.get_model_version("parent", "1").tags["candidate_digest"]
    child = {"target__layers": 4, **whole}
    made = set()
    for name, address in (("child", "models:/parent@champion"), ("twin", "models:/parent/1")):
        assert project.run(model={"registered": address}, name=name, **child) == 0
        tags = project.client.get_model_version(name, "1").tags
        assert (tags["base_digest"], tags["base_revision"]) == (parent, "parent version 1")
        made.add(tags["candidate_digest"])
    assert len(made) == 1
    capsys.readouterr()
    for address, said in (
        ("models:/parent@best", "parent has no alias 'best'"),
        ("models:/parent/7", "parent has no version 7"),
        ("models:/nobody@champion", "has no model 'nobody'"),
    ):
        assert project.run(model={"registered": address}, name="child", **child) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_tracked_folder_is_copied_whole_or_refused(project, monkeypatch):
    from dvc.api import DVCFileSystem

    from tasks.machine.workplace import find_workplace
    from tasks.versioned import copy_tables, resolve_versions

    place, table = find_workplace(), Path("data/prepared/evaluation")
    taken = resolve_versions(place, [table], "HEAD")
    assert taken[str(table)].digest.endswith(".dir")
    get = DVCFileSystem.get

    def lose_one(files, source, target, **options):
        get(files, source, target, **options)
        min(file for file in Path(target).rglob("*") if file.is_file()).unlink()

    with monkeypatch.context() as patched, pytest.raises(CalibrationError, match="is not what it was a moment ago"):
        patched.setattr(DVCFileSystem, "get", lose_one)
        copy_tables(place, taken)
    copied = copy_tables(place, taken)
    assert {f.name for f in (copied.folder / taken[str(table)].copy).iterdir()} == {f.name for f in table.iterdir()}


def test_of_one_registered_model_one_process_at_a_time_registers_whatever_room_runs_have(project, monkeypatch):
    from tasks.registry.tracking import hold_registered

    monkeypatch.setenv("MKA_SLOTS", "8")
    uri = f"sqlite:///{project.work / 'mlflow.db'}"
    inside, most = [], []

    def hold(model):
        with hold_registered(uri, model, "registration"):
            inside.append(model)
            most.append(inside.count("tiny"))
            time.sleep(0.2)
            inside.remove(model)

    threads = [threading.Thread(target=hold, args=("tiny",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 4 and max(most) == 1


def test_a_registry_that_cannot_be_locked_is_one_line(project, monkeypatch):
    from tasks.registry.tracking import connect_registry

    blocked = project.folder / "file"
    blocked.write_text("")
    with pytest.raises(RegistryError, match="cannot be locked"), connect_registry(f"sqlite:///{blocked}/mlflow.db"):
        pass


def test_the_work_folder_is_its_owners(project):
    shutil.rmtree(project.work)
    from tasks.machine.workplace import find_workplace

    find_workplace().prepare()
    assert stat.S_IMODE(project.work.stat().st_mode) == 0o700


def test_a_registry_whose_making_was_killed_is_made_again(tmp_path, monkeypatch):
    from tasks.registry import tracking

    database = tmp_path / "mlflow.db"

    def die(uri):
        with sqlite3.connect(tracking.find_database(uri)) as half_made:
            half_made.execute("create table jobs (creator text)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tracking, "_touch_tables", die)
        with tracking.connect_registry(f"sqlite:///{database}"):
            pass
    assert not database.exists()
    with tracking.connect_registry(f"sqlite:///{database}") as client:
        assert list(client.search_registered_models()) == []
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []
