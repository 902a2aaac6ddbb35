"""Cleaning beside runs: what killed ones left goes, and those that are alive are not disturbed."""

import contextlib
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
from support.work import MONTH, age, gone, make, make_work_folder, paths

from mka.errors import OutputError
from mka.store.cleaning import clean
from mka.store.manifests import MANIFEST
from mka.store.products import produce
from mka.store.publishing import replace_file

ROOT = Path(__file__).parents[3]


@pytest.fixture
def work(tmp_path):
    return make_work_folder(tmp_path)


def test_what_was_used_until_its_lock_was_free_stays(work, monkeypatch):
    folder = age(make(work).folder, 99)
    acquire = FileLock.acquire

    def wait_for_a_user(lock, *rest, **named):
        os.utime(folder / MANIFEST)
        return acquire(lock, *rest, **named)

    monkeypatch.setattr(FileLock, "acquire", wait_for_a_user)
    assert clean(work, MONTH).removed == []
    assert make(work).reused


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
