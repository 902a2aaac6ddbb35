"""Where relative paths begin and results go: in a project, in a folder that is none, and beside an installed copy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mka.outside import project
from mka.outside.project import find_root, find_work, in_checkout, suggest_table

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, of no project; a work folder is not named."""
    monkeypatch.delenv("MKA_WORK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_project_is_the_nearest_folder_above_that_dvc_takes_for_one(folder, monkeypatch):
    inner = folder / "mine" / "notes" / "deep"
    inner.mkdir(parents=True)
    (folder / ".dvc").mkdir()
    (folder / "mine" / ".dvc").mkdir()
    monkeypatch.chdir(inner)
    assert find_root() == folder / "mine" and find_work() == folder / "mine" / "data" / "work"
    assert not in_checkout() and "`base`" in suggest_table() and "make" not in suggest_table()


def test_outside_of_any_project_the_checkout_of_the_code_counts(folder):
    assert find_root() == ROOT and find_work() == ROOT / "data" / "work"
    # Its tables are not here, though.
    assert not in_checkout() and suggest_table("name another") == "name another"


def test_in_the_checkout_make_builds_the_tables(folder, monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    assert find_root() == ROOT and in_checkout() and "`make data`" in suggest_table("name another")


def test_an_installed_copy_works_in_the_current_folder(folder):
    """Even in an environment that lies in somebody's folder: nothing goes where packages are."""
    installed = folder / "environment" / "site-packages" / "mka" / "outside"
    installed.mkdir(parents=True)
    shutil.copy(project.__file__, installed / "project.py")
    code = "from project import *; print(find_root()); print(find_work()); print(in_checkout())"
    (folder / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder / "here",
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(folder / "here"), str(folder / "here" / "data" / "work"), "False"]


def test_a_work_folder_that_is_named_wins(folder, monkeypatch):
    monkeypatch.setenv("MKA_WORK", "elsewhere")
    assert find_work() == Path("elsewhere")


def test_flows_and_the_library_keep_their_things_in_one_place(folder, monkeypatch):
    from tasks.machine.workplace import find_workplace

    (folder / ".dvc").mkdir()
    place = find_workplace()
    assert (place.root, place.work) == (folder, folder / "data" / "work")
    assert place.path(Path("mine.jsonl")) == folder / "mine.jsonl"
