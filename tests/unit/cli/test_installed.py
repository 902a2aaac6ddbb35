"""Commands that are installed beside the library's: listed without their libraries, found in both layouts."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest

from flows.installed import COMMANDS
from mka.cli.main import cli, main

ROOT = Path(__file__).resolve().parents[3]
NAMED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mka.commands"]
HEAVY = {"prefect", "mlflow", "dvc", "great_expectations", "torch", "transformers", "pandas", "pydantic"}
# What is typed by those who change something and want to see it first.
CHANGING = ("run", "watch", "promote", "rollback", "registry-publish", "up", "down")


@pytest.fixture
def installed(monkeypatch):
    """The entry points of pyproject.toml, whether or not this environment was installed since they are there."""
    found = {
        name: EntryPoint(name, value.replace("mka_flows", "flows.installed"), "mka.commands")
        for name, value in NAMED.items()
    }
    monkeypatch.setattr("mka.cli.main.find_installed", lambda: found)
    return found


def lay_out(folder: Path, *, wheel: bool) -> Path:
    """Make a site-packages with the project's entry points, of a wheel or of an editable checkout."""
    site = folder / "site"
    (site / "mka_compress-1.dist-info").mkdir(parents=True)
    lines = "\n".join(f"{name} = {value}" for name, value in NAMED.items())
    (site / "mka_compress-1.dist-info/entry_points.txt").write_text(f"[mka.commands]\n{lines}\n")
    (site / "mka_compress-1.dist-info/METADATA").write_text("Name: mka-compress\nVersion: 1\n")
    (site / "mka").symlink_to(ROOT / "mka")
    if wheel:
        (site / "mka_flows").mkdir()
        shutil.copy(ROOT / "flows/installed/__init__.py", site / "mka_flows")
        for name in ("flows", "tasks"):
            (site / "mka_flows" / name).symlink_to(ROOT / name)
    else:
        (site / "mka_flows").symlink_to(ROOT / "flows/installed")
    return site


# An editable installation of this checkout would be found before anything that lies here.
TYPE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
from mka.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def type_(site: Path, *arguments: str, python=(), **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *python, "-c", TYPE, *arguments],
        capture_output=True,
        text=True,
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site), "MKA_WORK": str(site.parent / "work"), **environment},
    )


def test_entry_points_and_the_commands_they_name_are_the_same():
    assert {name: f"mka_flows:{name.replace('-', '_')}" for name in COMMANDS} == NAMED
    assert not NAMED.keys() & cli.commands.keys()


@pytest.mark.parametrize("name", NAMED)
def test_help_teaches_with_an_example_and_describes_every_option(name, installed, capsys):
    assert main([name, "--help"]) == 0
    page = capsys.readouterr().out
    assert f"mka {name}" in page.split("Example", 1)[1]
    assert "--json" in page and (name not in CHANGING or "--dry-run" in page)
    command = installed[name].load().make_context(name, ["--help"], resilient_parsing=True).command
    assert command.name == name
    assert all(option.help for option in command.params if isinstance(option, click.Option))


@pytest.mark.parametrize("wheel", [True, False], ids=["wheel", "checkout"])
def test_commands_are_listed_without_their_libraries_and_found_where_they_are_installed(tmp_path, wheel):
    site = lay_out(tmp_path, wheel=wheel)
    done = type_(site, "--help", python=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    listed = done.stdout.partition("Commands of production:")[2]
    assert all(f"\n  {name} " in listed and line[:20] in listed for name, line in COMMANDS.items())
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported and not imported & {*HEAVY, "tasks", "flows"}
    done = type_(site, "run", "--help", python=("-X", "importtime"))
    assert done.returncode == 0 and "mka run recipes/" in done.stdout, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "flows" in imported and not imported & {"prefect", "mlflow", "torch"}
    assert not (tmp_path / "work").exists()


def test_somebody_elses_flows_are_passed_over_unread(tmp_path):
    site = lay_out(tmp_path, wheel=True)
    for name in ("flows", "tasks"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
        (tmp_path / "theirs" / name / "__init__.py").write_text("raise SystemExit('theirs was imported')")
    done = type_(site, "up", "--help", PYTHONPATH=f"{tmp_path / 'theirs'}{os.pathsep}{site}")
    assert done.returncode == 0 and "mka up" in done.stdout, done.stderr


def test_a_command_whose_extra_is_missing_names_it_and_its_help_does_not_need_it(installed, monkeypatch, capsys):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "mlflow" else find(name, *rest))
    assert main(["index"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mka: ") and "mlflow" in line and "pip install 'mka-compress[flow]'" in line
    assert main(["index", "--help"]) == 0


def test_an_entry_point_that_cannot_be_loaded_hides_no_other(installed, capsys):
    installed["broken"] = EntryPoint("broken", "no_such_module_at_all:command", "mka.commands")
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert "watch" in page and "broken" not in page
    assert main(["broken"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`mka broken` cannot be loaded" in line and "no_such_module_at_all" in line


def test_a_module_is_the_same_command_with_the_same_refusals(capsys):
    from flows.rollback import main as rollback

    assert rollback(["--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: python -m flows.rollback ")
    assert rollback(["tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rollback: Missing option '--because'") and "python -m flows.rollback --help" in line


def test_what_would_be_stopped_is_said_and_nothing_is(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MKA_WORK", str(tmp_path))
    assert main(["down", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"would_stop": []}
    assert main(["down"]) == 0
    assert capsys.readouterr().out == "nothing runs\n"
    assert list(tmp_path.iterdir()) == []
    assert main(["up", "--dry-run"]) in (0, 2)  # 2: somebody else's server has the port
    assert list(tmp_path.iterdir()) == []
