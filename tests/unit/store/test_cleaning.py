"""Cleaning the work folder: what is old goes, what is young, held, linked or pointed at stays."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mka.cli.main import main
from mka.errors import DurationError, OutputError
from mka.store.cleaning import clean, read_duration
from mka.store.products import MANIFEST, find, produce
from mka.store.publishing import replace_file

ROOT = Path(__file__).parents[3]
DAY = 86400.0
MONTH = timedelta(days=30)


def age(path: Path, days: float) -> Path:
    """Make a path look written that many days ago, with everything below it."""
    then = time.time() - days * DAY
    for part in (*path.rglob("*"), path):
        os.utime(part, (then, then), follow_symlinks=False)
    return path


def make(work: Path, number: int = 0, stage: str = "merge", content: str = "weights"):
    """Store one result as every stage does."""

    def write(folder: Path):
        (folder / "model").mkdir()
        (folder / "model" / "x.bin").write_text(content)
        return {"number": number}

    return produce(work / "stages", stage, version=1, settings={"number": number}, inputs={}, make=write)


def look(work: Path, number: int = 0):
    return find(work / "stages", "merge", version=1, settings={"number": number}, inputs={})


def paths(work: Path) -> set[str]:
    return {path.relative_to(work).as_posix() for path in work.rglob("*")}


def gone(work: Path, limit: timedelta = MONTH, **options) -> dict[str, str]:
    """Clean; return the kind of everything that went but lock files."""
    found = clean(work, limit, **options)
    return {item.path.as_posix(): item.kind for item in found.removed if item.kind != "stale lock"}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    (folder / "stages").mkdir(parents=True)
    return folder


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


def test_what_was_used_until_its_lock_was_free_stays(work, monkeypatch):
    folder = age(make(work).folder, 99)
    acquire = FileLock.acquire

    def wait_for_a_user(lock, *rest, **named):
        os.utime(folder / MANIFEST)
        return acquire(lock, *rest, **named)

    monkeypatch.setattr(FileLock, "acquire", wait_for_a_user)
    assert clean(work, MONTH).removed == []
    assert make(work).reused


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


def killed_run(work: Path) -> Path:
    """Let a process make a result, kill it in the middle and return what it left."""
    code = f"""
        import time
        from pathlib import Path
        from mka.store.products import produce
        def make(folder):
            (folder / "half.bin").write_bytes(b"0" * 1000)
            print("there", flush=True)
            time.sleep(600)
        produce(Path({str(work / "stages")!r}), "merge", version=1, settings={{}}, inputs={{}}, make=make)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "there\n"
        (partial,) = (work / "stages").glob(".merge-*.partial-*")
        assert gone(age(work, 99)) == {} and partial.is_dir()  # alive: its lock is held, however old the files look
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    return partial


def test_what_a_killed_run_left_goes_at_any_age_and_not_before_it_is_dead(work):
    partial = killed_run(work)
    os.utime(partial)
    found = clean(work, MONTH)
    assert [(item.kind, item.path.name, item.size) for item in found.removed] == [
        ("killed run", partial.name, 1000),
        ("stale lock", f"{partial.name.partition('.partial')[0]}.lock", 0),
    ]
    assert paths(work) == {"stages"}


def test_locks_without_a_result_go_and_those_of_stored_results_stay(work):
    kept = make(work).folder
    for name in (".merge-0123456789abcdef.lock", ".held-0123456789abcdef.lock", ".other.lock"):
        (work / "stages" / name).touch()
    with FileLock(work / "stages" / ".held-0123456789abcdef.lock"):
        found = clean(work, MONTH)
    assert [item.path.name for item in found.removed] == [".merge-0123456789abcdef.lock"]
    assert found.notes == ["stages/held-0123456789abcdef is being worked on and stays"]
    assert (work / "stages" / f".{kept.name}.lock").exists() and (work / "stages" / ".other.lock").exists()


def test_candidates_of_a_killed_comparison_go_and_those_being_measured_stay(work):
    for name in ("0123456789abcdef", "fedcba9876543210", "mine"):
        (work / "bench" / name).mkdir(parents=True)
        (work / "bench" / f".{name}.lock").touch()
    with FileLock(work / "bench" / ".fedcba9876543210.lock"):
        assert gone(work) == {"bench/0123456789abcdef": "killed run"}
    assert sorted(path.name for path in (work / "bench").glob("[!.]*")) == ["fedcba9876543210", "mine"]


def test_temporary_folders_go_when_nobody_wrote_to_them_for_a_day(work):
    for area, name in (
        ("models", ".llm-1.0-abcd12_x"),
        ("packages", ".fetch-abcd12_x"),
        ("registry", ".version-abcd12_x"),
    ):
        for days, suffix in ((2.0, "y"), (0.5, "z"), (2.0, "w")):
            folder = work / area / name.replace("x", suffix)
            folder.mkdir(parents=True)
            (folder / "deep").mkdir()
            (folder / "deep" / "half").write_text("half")
            age(folder, days)
        os.utime(folder / "deep" / "half")  # still written to
    assert gone(work, timedelta(days=300)) == {
        "models/.llm-1.0-abcd12_y": "unfinished model",
        "packages/.fetch-abcd12_y": "unfinished download",
        "registry/.version-abcd12_y": "killed promotion",
    }
    assert (work / "packages" / ".fetch-abcd12_w" / "deep" / "half").exists()


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


def test_what_a_killed_writer_of_the_last_run_left_goes_by_the_name_it_has(work):
    def be_killed(aside):
        aside.write_text("{")
        left.append(aside.name)
        os.link(aside, work / "kept")  # as if nobody had tidied up

    left = []
    replace_file(work / "last_run.json", be_killed)
    (work / "kept").rename(work / left[0])
    (work / "last_run.json").write_text("{}")
    assert gone(work) == {}  # its writer may still be at it
    age(work, 999)
    assert gone(work) == {left[0]: "killed run"}
    assert (work / "last_run.json").is_file()


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


def test_a_result_that_cannot_be_removed_is_said_in_one_line(work, monkeypatch):
    age(make(work).folder, 99)

    def refuse(path, *rest, **named):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("mka.store.cleaning.shutil.rmtree", refuse)
    with pytest.raises(OutputError, match=r"cannot be removed: Permission denied; 0 things"):
        clean(work, MONTH)
    monkeypatch.undo()
    # What was put out of sight is known to be nobody's, and goes next time.
    assert list(gone(work).values()) == ["killed run"]
    assert paths(work) == {"stages"}


def test_producing_and_cleaning_at_once(work):
    """Producers make and reuse results while cleaners find every one of them old enough to go."""
    stop = threading.Event()
    problems: list[str] = []
    turns = {"made": 0, "reused": 0, "removed": 0}
    making: set[int] = set()

    def producer(step: int):
        for turn in range(150):
            number = turn * step % 3

            def write(folder: Path, number=number):
                if number in making:
                    problems.append(f"{number} is made by two at once")
                making.add(number)
                (folder / "x.bin").write_text(str(number))
                time.sleep(0.001)
                making.discard(number)
                return {"number": number}

            made = produce(
                work / "stages", "merge", version=1, settings={"number": number}, inputs={}, make=write
            )  # raises if its files go while it writes or hashes them
            turns["reused" if made.reused else "made"] += 1

    def cleaner():
        while not stop.is_set():
            for manifest in (work / "stages").glob(f"merge-*/{MANIFEST}"):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(manifest, (0, 0))
            turns["removed"] += len(gone(work, timedelta(hours=1)))

    def note(job, *arguments):
        try:
            job(*arguments)
        except Exception as error:
            problems.append(repr(error))

    producers = [threading.Thread(target=note, args=(producer, step)) for step in (1, 2, 4)]
    cleaners = [threading.Thread(target=note, args=(cleaner,)) for _ in range(2)]
    for thread in (*producers, *cleaners):
        thread.start()
    for thread in producers:
        thread.join()
    stop.set()
    for thread in cleaners:
        thread.join()
    assert problems == []
    assert turns["made"] > 3 and turns["reused"] > 0 and turns["removed"] > 0  # the race took place
    assert list((work / "stages").glob(".*.partial-*")) == []


def test_a_result_in_the_making_is_never_touched(work):
    """The maker looks at its folder again and again while the work folder is cleaned around it."""
    inside, done = threading.Event(), threading.Event()
    seen = []

    def write(folder: Path):
        (folder / "x.bin").write_text("x")
        age(folder, 999)
        inside.set()
        assert done.wait(60)
        seen.append((folder / "x.bin").read_text())
        return {}

    thread = threading.Thread(
        target=lambda: produce(work / "stages", "merge", version=1, settings={}, inputs={}, make=write)
    )
    thread.start()
    assert inside.wait(60)
    try:
        for _ in range(20):
            found = clean(work, timedelta(hours=1))
            assert found.removed == [] and len(found.notes) == 1
    finally:
        done.set()
        thread.join()
    assert seen == ["x"]
    assert len(list((work / "stages").glob("merge-*"))) == 1


def test_the_command_lists_removes_and_reports(work, capsys):
    old = age(make(work, 0, content="x" * 2_000_000).folder, 40)
    make(work, 1)
    assert main(["clean", "--work", str(work), "--older-than", "30d", "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["what", "path", "size", "age"]
    assert shown[2].split()[2:] == [f"stages/{old.name}", "2.0", "MB", "40", "d"]
    assert shown[-1] == "dry run: nothing was removed" and "would go" in shown[-2]
    assert old.is_dir()
    assert main(["clean", "--work", str(work), "--older-than", "30d", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [item["kind"] for item in document["removed"]] == ["stage result", "stale lock"]
    assert document["removed"][0]["path"] == f"stages/{old.name}" and document["bytes"] > 2_000_000
    assert not old.exists()
    assert main(["clean", "--work", str(work), "--older-than", "30d"]) == 0
    assert capsys.readouterr().out == f"0.0 kB in 0 things went from {work}\n"


def test_the_command_finds_the_work_folder_and_refuses_in_one_line(work, tmp_path, capsys, monkeypatch):
    folder = age(make(work).folder, 40)
    monkeypatch.setenv("MKA_WORK", str(work))
    assert main(["clean", "--older-than", "30d"]) == 0
    assert not folder.exists()
    capsys.readouterr()
    for arguments, reason in (
        (["--older-than", "soon"], "12h, 30d or 2w. See `mka clean --help`."),
        ([], "--older-than"),
        (["--older-than", "1d", "--work", str(tmp_path / "absent")], "does not look like a work folder"),
    ):
        assert main(["clean", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mka: ") and reason in line


def test_help_says_that_registered_versions_are_safe(capsys):
    assert main(["clean", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "registry holds its own copy" in text and "never a registered version" in text
