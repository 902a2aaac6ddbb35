"""Cleaning by its command."""

import json

import pytest
from support.work import age, make, make_work_folder

from mka.cli.main import main


@pytest.fixture
def work(tmp_path):
    return make_work_folder(tmp_path)


def test_the_command_lists_removes_and_reports(work, capsys):
    old = age(make(work, 0, content="x" * 2_000_000).folder, 40)
    make(work, 1)
    assert main(["clean", "--work", str(work), "--older-than", "30d", "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["what", "path", "size", "age"]
    assert shown[2].split()[2:] == [f"stages/{old.name}", "2", "MB", "40", "d"]
    assert shown[-1] == "dry run: nothing was removed" and "would go" in shown[-2]
    assert old.is_dir()
    assert main(["clean", "--work", str(work), "--older-than", "30d", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [item["kind"] for item in document["removed"]] == ["stage result", "stale lock"]
    assert document["removed"][0]["path"] == f"stages/{old.name}" and document["bytes"] > 2_000_000
    assert not old.exists()
    assert main(["clean", "--work", str(work), "--older-than", "30d"]) == 0
    assert capsys.readouterr().out == f"0 B in 0 things went from {work}\n"


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
