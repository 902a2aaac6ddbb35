"""The page of all recompressions, read from a real MLflow store that was filled by hand."""

import json

import pytest

from mka.errors import RegistryError
from tasks.machine.workplace import Workplace
from tasks.registry.index import read_history, write_index_page

pytestmark = pytest.mark.flow

MANY = 120
ATTACK = "<img src=x onerror=alert(1)>"
START = 1_770_000_000_000  # milliseconds; every run is one second later than the one before


class Store:
    """An MLflow store in a work folder, and ways to put into it what `tasks.registry.record` would."""

    def __init__(self, folder):
        from mlflow import MlflowClient

        self.place = Workplace(folder, folder / "work")
        self.place.work.mkdir()
        self.client = MlflowClient(self.place.tracking_uri, self.place.tracking_uri)
        self.experiment = self.client.create_experiment("mka", artifact_location=self.place.model_artifacts)
        self.clock = START

    def run(self, run_name, *, experiment=None, status="FINISHED", params=(), metrics=(), **tags):
        from mlflow.entities import Metric, Param, RunTag

        self.clock += 1000
        run = self.client.create_run(experiment or self.experiment, start_time=self.clock, run_name=run_name)
        self.client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, value, self.clock, 0) for name, value in dict(metrics).items()],
            params=[Param(name, value) for name, value in dict(params).items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        if status:
            self.client.set_terminated(run.info.run_id, status)
        return run

    def version(self, name, run, **tags):
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            assert error.error_code == "RESOURCE_ALREADY_EXISTS"
        made = self.client.create_model_version(name, run.info.artifact_uri, run.info.run_id, tags=tags)
        return str(made.version)


TAGS = {"base_model": "acme/tiny", "base_revision": "abc", "method": "aligned", "recipe": "tiny-fast"}
PARAMS = {"name": "tiny-fast", "registry.name": "tiny"}


def measure(layers, recovery, **more):
    return {
        "base/layers": 30.0,
        "candidate/layers": float(layers),
        "layer_ratio": 1 - layers / 30,
        "size_ratio": 0.5,
        "gate/perplexity boolq/recovery": recovery,
        "gate/perplexity boolq/lower": recovery - 0.02,
        "gate/perplexity boolq/threshold": 0.75,
        "base/boolq/perplexity": 16.0,
        **more,
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = Store(tmp_path_factory.mktemp("index"))
    whole = {"mka.key": "k", "mka.complete": "true"}

    tasks = {"gate/tasks/recovery": 0.9, "gate/tasks/lower": 0.8, "gate/tasks/upper": 1.0}
    # Half of what is stored is left, a quarter of what is served.
    tasks |= {"base/bytes": 4e8, "candidate/bytes": 2e8, "base/served_bytes": 2e8, "candidate/served_bytes": 5e7}
    for role, rate in (("base", 20.0), ("candidate", 25.0)):
        speed = f"{role}/decode_tokens_per_second"
        tasks |= {speed: rate, f"{speed}_least": rate - 1, f"{speed}_most": rate + 1}
    passed = made.run("passed", params=PARAMS, metrics=measure(24, 0.8, **tasks), verdict="pass", **TAGS)
    report = made.place.work / "mlartifacts" / passed.info.run_id / "artifacts" / "report" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<p>evidence</p>")
    move = {"when": "2026-02-02T10:00:00+00:00", "who": "ann", "why": "gate passed", "alias": "champion"}
    move |= {"from": None, "to": "1", "action": "promote"}
    assert made.version("tiny", passed, **whole, **{"move.20260202T100000Z": json.dumps(move)}) == "1"

    made.client.set_tag(passed.info.run_id, "mlflow.source.name", "mka run recipes/tiny.yaml")
    undecided = made.run("undecided", params=PARAMS, metrics=measure(20, 0.6), verdict="undecided", **TAGS)
    assert made.version("tiny", undecided, **{"mka.key": "k2", "move.x": "not JSON", "move.y": "[1]"}) == "2"
    for alias, version in (("champion", "1"), ("candidate", "2"), ("also", "1")):
        made.client.set_registered_model_alias("tiny", alias, version)

    attacker = TAGS | {"base_model": ATTACK, "recipe": ATTACK}
    params = {"name": ATTACK, "registry.name": "None"}
    made.run(ATTACK, params=params, metrics=measure(10, 0.1), verdict="fail", **attacker)
    made.version(ATTACK, made.run("injected", metrics=measure(9, 0.1), verdict="pass", **attacker), **whole)

    gone = made.run("gone", metrics=measure(28, 0.9), verdict="pass", **TAGS)
    made.version("lost", gone, **whole, verdict="pass", **TAGS)
    made.client.delete_run(gone.info.run_id)

    made.run("unfinished", status=None, **TAGS)
    made.run("crashed", status="FAILED", **TAGS)
    elsewhere = made.client.create_experiment("somebody else's")
    made.version("foreign", made.run("foreign", experiment=elsewhere), mka="no")

    for i in range(MANY):
        made.run(f"many-{i}", verdict="fail", recipe="tiny")
    shared = made.run("shared", verdict="pass")
    for _ in range(MANY):
        made.version("crowd", shared, **whole)
    made.client.set_registered_model_alias("crowd", "champion", str(MANY))
    return made


@pytest.fixture(scope="module")
def history(store):
    return read_history(store.place)


@pytest.fixture(scope="module")
def rows(history):
    return {row.run or row.name: row for row in history.rows if row.name != "crowd"}


def test_every_finished_run_and_every_version_is_a_row_and_nothing_else(history, rows):
    assert set(rows) == {"passed", "undecided", ATTACK, "injected", "lost", *(f"many-{i}" for i in range(MANY))}
    assert len(history.rows) == 5 + 2 * MANY


def test_versions_are_read_page_by_page_and_share_a_run(history):
    crowd = [row for row in history.rows if row.name == "crowd"]
    assert {row.version for row in crowd} == {str(i + 1) for i in range(MANY)} and {r.run for r in crowd} == {"shared"}
    assert [row.version for row in crowd if row.is_champion] == [str(MANY)]


def test_a_version_is_joined_to_its_run_and_its_aliases(rows):
    row = rows["passed"]
    assert (row.name, row.version, row.verdict) == ("tiny", "1", "pass")
    assert row.aliases == ("also", "champion") and row.is_champion and row.complete
    assert (row.base_model, row.base_revision, row.method, row.recipe) == ("acme/tiny", "abc", "aligned", "tiny-fast")
    assert (row.layers_in, row.layers_out) == (30, 24)
    assert (row.size, row.base_size, row.size_ratio) == (5e7, 2e8, 0.75)
    assert (row.decode, row.base_decode) == ((24.0, 25.0, 26.0), (19.0, 20.0, 21.0))
    assert row.time_left == pytest.approx(0.8)
    assert row.layer_ratio == pytest.approx(0.2) and row.when.timestamp() * 1000 == START + 1000
    text, tasks = row.recoveries
    assert (text.label, text.value, text.upper) == ("boolq", 0.8, None) and text.lower == pytest.approx(0.78)
    assert (text.threshold, tasks.threshold) == (0.75, None) and row.is_demonstration
    assert (tasks.name, tasks.value, tasks.lower, tasks.upper) == ("tasks", 0.9, 0.8, 1.0)
    assert row.report.read_text() == "<p>evidence</p>" and row.page is None
    assert row.command == "mka run recipes/tiny.yaml"
    other = rows["undecided"]
    # What an older release recorded.
    assert (other.size_ratio, other.size, other.decode, other.command) == (0.5, None, None, "")
    assert other.version == "2" and other.aliases == ("candidate",)
    assert (
        not other.complete and other.report is None and all(recovery.name != "tasks" for recovery in other.recoveries)
    )


def test_a_refused_run_has_no_version_and_the_name_it_would_have_had(rows):
    row = rows[ATTACK]
    assert row.version is None and row.verdict == "fail" and row.name == ATTACK and row.aliases == ()


def test_a_version_whose_run_was_deleted_is_told_by_its_tags(rows):
    row = rows["lost"]
    assert row.version == "1" and row.verdict == "pass" and row.method == "aligned"
    assert row.layers_in is None and row.recoveries == () and row.when.timestamp() > 0


def test_moves_are_read_and_unreadable_ones_are_shown(history):
    moves = {move.why: move for move in history.moves}
    move = moves["gate passed"]
    assert (move.name, move.alias, move.action, move.before, move.after) == ("tiny", "champion", "promote", None, "1")
    assert move.who == "ann" and move.when.isoformat() == "2026-02-02T10:00:00+00:00"
    assert {why for why, move in moves.items() if move.action == "unreadable record"} == {"not JSON", "[1]"}


def test_the_page_shows_them_and_markup_stays_text(store):
    page = write_index_page(store.place)
    assert page == store.place.work / "index.html"
    text = page.read_text(encoding="utf-8")
    assert ATTACK not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    assert f"{5 + 2 * MANY} recompressions of 4 models" in text and text.count("many-") >= MANY
    assert 'href="mlartifacts/' in text and "foreign" not in text and "unfinished" not in text


def run_main(monkeypatch, work, *arguments):
    from flows.index import main

    monkeypatch.setenv("MKA_WORK", str(work))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return main(list(arguments))


def test_the_command_prints_the_page_and_can_be_given_a_registry(store, tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, tmp_path / "new", "--registry", store.place.tracking_uri) == 0
    output = capsys.readouterr()
    page = tmp_path / "new" / "index.html"
    assert output.out == f"{page}\n" and output.err == ""
    assert "tiny-fast" in page.read_text(encoding="utf-8")


def test_a_place_without_a_registry_gets_an_empty_page_and_no_database(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, tmp_path / "work") == 0
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert "no recompression yet" in line and "mka run recipes/" in line
    page = tmp_path / "work" / "index.html"
    assert output.out == f"{page}\n" and "Nothing has been recompressed yet" in page.read_text()
    assert list(page.parent.iterdir()) == [page]


def test_a_store_without_the_experiment_is_empty(tmp_path):
    from mlflow import MlflowClient

    place = Workplace(tmp_path, tmp_path)
    MlflowClient(place.tracking_uri, place.tracking_uri).create_registered_model("somebody-elses")
    assert read_history(place).rows == () == read_history(place).moves


def test_a_registry_that_cannot_be_read_is_one_line_and_the_page_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "index.html").write_text("old")
    missing = f"sqlite:///{tmp_path / 'absent.db'}"
    for uri, told in (("http://127.0.0.1:9", "cannot be used"), (missing, "no such file")):
        assert run_main(monkeypatch, tmp_path, "--registry", uri) == 2
        output = capsys.readouterr()
        (line,) = output.err.splitlines()
        assert line.startswith("index: registry ") and uri in line and told in line and output.out == ""
    assert (tmp_path / "index.html").read_text() == "old" and not (tmp_path / "absent.db").exists()
    with pytest.raises(RegistryError):
        write_index_page(Workplace(tmp_path, tmp_path), missing)


def test_help_teaches(capsys):
    from flows.index import main

    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--registry URI" in text and "MKA_WORK" in text and "Examples: mka index" in text
