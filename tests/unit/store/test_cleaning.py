"""Cleaning the work folder: what is old goes, what is young, held, linked or pointed at stays."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.work import DAY, MONTH, age, gone, look, make, make_work_folder, paths

from mka.errors import DurationError, OutputError
from mka.store.cleaning import clean, read_duration
from mka.store.manifests import MANIFEST


@pytest.fixture
def work(tmp_path):
    return make_work_folder(tmp_path)


@pytest.mark.parametrize(("text", "hours"), [("12h", 12), ("1d", 24), ("30d", 720), ("2w", 336), (" 2w ", 336)])
def test_durations(text, hours):
    assert read_duration(text) == timedelta(hours=hours)


@pytest.mark.parametrize(
    "text", ["", "30", "d", "0d", "00h", "-1d", "1.5d", "1m", "1 d", "30D", "1d12h", "9" * 7 + "d"]
)
def test_other_durations_are_refused_with_the_allowed_forms(text):
    with pytest.raises(DurationError, match=r"12h, 30d or 2w"):
        read_duration(text)


def test_an_unused_result_goes_with_its_lock_and_a_used_one_stays(work):
    old, young = make(work, 0), make(work, 1)
    age(old.folder, 31)
    age(young.folder, 29)
    found = clean(work, MONTH)
    assert [(item.kind, item.path.name) for item in found.removed] == [
        ("stage result", old.folder.name),
        ("stale lock", f".{old.folder.name}.lock"),
    ]
    assert found.removed[0].unused == pytest.approx(31 * DAY, abs=60)
    assert paths(work) == {
        "stages",
        *(f"stages/{young.folder.name}{part}" for part in ("", "/model", "/model/x.bin", f"/{MANIFEST}")),
        f"stages/.{young.folder.name}.lock",
    }
    assert make(work, 1).reused and not make(work, 0).reused


def test_a_dry_run_leaves_no_lock_behind(work):
    folder = age(make(work).folder, 99)
    (work / "stages" / f".{folder.name}.lock").unlink()
    before = paths(work)
    assert gone(work, dry_run=True) == {f"stages/{folder.name}": "stage result"}
    assert paths(work) == before
    clean(work, MONTH)
    assert paths(work) == {"stages"}


@pytest.mark.parametrize("use", [make, look])
def test_reuse_counts_as_use(work, use):
    folder = age(make(work).folder, 400)
    assert use(work).reused
    assert gone(work, timedelta(hours=1)) == {}
    assert folder.is_dir()


def test_reuse_does_not_need_a_store_that_can_be_written(work, monkeypatch):
    make(work)
    asked = []

    def refuse(path, *rest, **named):
        asked.append(Path(path).name)
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("mka.store.products.os.utime", refuse)
    assert make(work).reused and look(work).reused
    assert asked == [MANIFEST, MANIFEST]


def test_a_damaged_result_is_not_marked_as_used(work):
    folder = make(work).folder
    (folder / "model" / "x.bin").write_text("other")
    age(folder, 31)
    assert look(work) is None
    assert gone(work) == {f"stages/{folder.name}": "stage result"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ages=st.lists(st.floats(min_value=-2, max_value=60).filter(lambda days: abs(days - 10) > 0.01), max_size=6),
    held=st.sets(st.integers(0, 5)),
    pointed=st.sets(st.integers(0, 5)),
    dry_run=st.booleans(),
)
def test_nothing_younger_held_or_pointed_at_ever_goes(tmp_path_factory, ages, held, pointed, dry_run):
    work = tmp_path_factory.mktemp("work")
    made = [make(work, number).folder for number in range(len(ages))]
    (work / "stages").mkdir(exist_ok=True)
    for folder, days in zip(made, ages, strict=True):
        age(folder, days)
    targets = [str(made[number] / "model") for number in pointed if number < len(made)]
    (work / "last_run.json").write_text(json.dumps({"stages": {"deep": [{"x": path} for path in targets]}}))
    locks = [FileLock(work / "stages" / f".{made[number].name}.lock") for number in held if number < len(made)]
    before = paths(work)
    for lock in locks:
        lock.acquire()
    try:
        listed = gone(work, timedelta(days=10), dry_run=True)
        went = gone(work, timedelta(days=10), dry_run=dry_run)
    finally:
        for lock in locks:
            lock.release()
    expected = {
        f"stages/{folder.name}"
        for number, (folder, days) in enumerate(zip(made, ages, strict=True))
        if days > 10 and number not in held and number not in pointed
    }
    assert set(went) == set(listed) == expected
    if dry_run:
        assert paths(work) == before
    else:
        assert {f"stages/{folder.name}" for folder in made if not folder.exists()} == expected
        assert list((work / "stages").glob(".*.partial-*")) == []


def test_what_the_last_run_points_at_stays_though_the_work_folder_was_moved(work):
    made = {key: make(work, number).folder for number, key in enumerate(("candidate", "report", "plan", "other"))}
    for folder in made.values():
        age(folder, 99)
    facts = {"candidate": f"{made['candidate']}/model", "report": f"{made['report']}/report.html"}
    (work / "last_run.json").write_text(json.dumps(facts | {"plan": f"{made['plan']}/plan.json", "seconds": 3}))
    moved = work.rename(work.with_name("moved"))
    assert gone(moved) == {f"stages/{made['other'].name}": "stage result"}


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_a_last_run_that_cannot_be_read_stops_everything(work, content):
    folder = age(make(work).folder, 99)
    (work / "last_run.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"last_run\.json cannot be read .*nothing was removed"):
        clean(work, MONTH)
    assert folder.is_dir()


def test_old_wheels_go_and_models_only_when_asked(work):
    (work / "packages").mkdir()
    for name, days in (("old.whl", 31), ("young.whl", 29), ("old.txt", 31)):
        (work / "packages" / name).write_text("x")
        age(work / "packages" / name, days)
    for name, days in (("old", 31), ("used", 31), ("young", 29), ("foreign", 31)):
        folder = work / "models" / name
        folder.mkdir(parents=True)
        (folder / ("config.json" if name == "foreign" else "SHA256SUMS")).write_text("x")
        age(folder, days)
    (work / "models" / ".demo-model-fetched").touch()
    (work / "last_run.json").write_text(json.dumps({"base": str(work / "models" / "used")}))
    assert gone(work) == {"packages/old.whl": "wheel"}
    assert (work / "models" / ".demo-model-fetched").exists()
    with FileLock(work / "stages" / ".merge-0123456789abcdef.lock"):  # a run goes on
        assert gone(work, models=True) == {}
    assert gone(work, models=True) == {"models/old": "base model", "models/.demo-model-fetched": "mark"}
    assert sorted(path.name for path in (work / "models").iterdir()) == ["foreign", "used", "young"]


def test_stores_and_whatever_else_lies_there_stay(work):
    for name in ("mlflow.db", "mlartifacts/1/model", "prefect/prefect.db", "checks/index.html", "stages/notes.txt",
                 "stages/mine/file", "other/file", "last_run.json", ".tables-built"):  # fmt: skip
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (work / ".last_run.json.4711").write_text("{")
    before = paths(work)
    age(work, 999)
    assert gone(work, timedelta(hours=1), models=True) == {".last_run.json.4711": "killed run"}
    assert paths(work) == before - {".last_run.json.4711"}


@pytest.mark.parametrize(
    "where",
    [
        "stages",
        "stages/merge-0123456789abcdef",
        "stages/.merge-0123456789abcdef.partial-1",
        "models/.llm-abcd12_x",
        "packages/x.whl",
    ],
)
def test_links_are_neither_followed_nor_removed(work, tmp_path, where):
    outside = tmp_path / "outside"
    (outside / "merge-0123456789abcdef").mkdir(parents=True)
    (outside / "merge-0123456789abcdef" / MANIFEST).write_text("{}")
    (outside / ".merge-fedcba9876543210.lock").touch()
    (work / "models").mkdir()
    (work / "packages").mkdir()
    link = work / where
    if where == "stages":
        link.rmdir()
    link.symlink_to(outside)
    if where == "stages/merge-0123456789abcdef":
        (work / "stages" / ".merge-0123456789abcdef.lock").touch()
    age(tmp_path, 999)
    before = paths(tmp_path)
    found = clean(work, timedelta(hours=1), models=True)
    assert found.removed == []
    assert paths(tmp_path) == before and link.is_symlink()
    assert found.notes == (["stages is a link and was not followed"] if where == "stages" else [])


def test_links_inside_a_result_go_and_what_they_point_at_stays(work, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x" * 5000)
    folder = make(work).folder
    (folder / "link").symlink_to(precious)
    (folder / "file").symlink_to(precious / "file")
    age(folder, 99)
    (removed, _) = clean(work, MONTH).removed
    assert removed.size < 5000 and not folder.exists()
    assert (precious / "file").read_text() == "x" * 5000


def test_a_work_folder_that_is_itself_a_link_is_cleaned(work, tmp_path):
    folder = age(make(work).folder, 99)
    (tmp_path / "link").symlink_to(work)
    assert gone(tmp_path / "link") == {f"stages/{folder.name}": "stage result"}


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "stages").write_text("a file")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OutputError, match=r"does not look like a work folder.*MKA_WORK"):
            clean(folder, MONTH)


def test_what_a_killed_healing_left_beside_results_goes_after_a_day(work):
    left, other = work / "stages" / ".healed-abcd12_x", work / "stages" / ".other-abcd12_x"
    for folder, days in ((left, 0.5), (other, 99)):
        (folder / "model").mkdir(parents=True)
        age(folder, days)
    assert gone(work) == {}
    age(left, 1.5)
    assert gone(work) == {"stages/.healed-abcd12_x": "unfinished healing"}
    assert paths(work) == {"stages", "stages/.other-abcd12_x", "stages/.other-abcd12_x/model"}


def test_the_scratch_folder_of_an_unfinished_result_goes_by_age_and_not_while_it_is_written(work):
    name = "plan-" + 16 * "a"
    scratch = work / "stages" / f".{name}.scratch"
    scratch.mkdir()
    (scratch / "journal.jsonl").write_text("measured")
    age(scratch / "journal.jsonl", 29)
    age(scratch, 29)
    assert gone(work) == {} and scratch.exists()
    age(scratch / "journal.jsonl", 31)
    age(scratch, 31)
    with FileLock(work / "stages" / f".{name}.lock"):
        assert gone(work) == {} and scratch.exists()
    assert gone(work) == {f"stages/.{name}.scratch": "unfinished result"}
    assert paths(work) == {"stages"}
