"""The sweep runs the grid of `mka bench` as tasks: the same table, and cells that either of them reuses."""

import json

import pytest
from support.bench import make_bench_folder, write_absolute_recipe

from mka.cli.main import main as run_command

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(make_bench_folder(tmp_path))
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))
    return tmp_path


def stored(root):
    """When each result's folder was made; reusing one touches a file in it and not the folder."""
    return {path.name: path.stat().st_mtime_ns for path in (root / "work/stages").glob("*-*") if path.is_dir()}


def test_sweep_and_command_share_their_cells_and_say_the_same(root, capsys):
    from flows.sweep import main

    recipe = write_absolute_recipe(root)
    assert run_command(["bench", str(recipe), "--only", "sleb"]) == 0
    before = stored(root)
    capsys.readouterr()
    assert main([str(recipe), "--workers", "2"]) == 0
    said = capsys.readouterr()
    assert {name: time for name, time in stored(root).items() if name in before} == before
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert lines[0].split() == ["base", "stored"] and len(lines) == 3 and all("mka at" in line for line in lines[1:])

    everything = stored(root)
    assert run_command(["bench", str(recipe)]) == 0
    assert capsys.readouterr().out == said.out and stored(root) == everything
    assert "sleb" in (root / "page.md").read_text()
    assert run_command(["bench", str(recipe), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 4


def test_a_failed_cell_sets_the_exit_code_and_the_others_are_kept(root, capsys, monkeypatch):
    import mka.pipeline.merge
    from flows.sweep import main
    from mka.pipeline.merge import write_merged

    write = write_merged

    def fail(plan, *rest):
        if plan.layers_out == 5:
            raise RuntimeError("a mistake")
        return write(plan, *rest)

    monkeypatch.setattr(mka.pipeline.merge, "write_merged", fail)
    assert main([str(write_absolute_recipe(root, methods=[{"name": "mka"}]))]) == 1
    said = capsys.readouterr()
    assert "mka at 5 failed: RuntimeError: a mistake" in said.out
    assert said.err.splitlines()[-1].startswith("sweep: 1 of 2 cells failed unexpectedly")
    assert len(list((root / "work/stages").glob("bench-facts-*"))) == 1


def test_refusals_are_one_line(root, capsys):
    from flows.sweep import main

    assert main([str(root / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("sweep: recipe not found")
    assert main([str(write_absolute_recipe(root, targets=[7]))]) == 2
    assert capsys.readouterr().err.startswith("sweep: target of 7 layers: the model has 6")
    assert main([str(root / "tiny.yaml"), "--workers", "0"]) == 2
    assert "'--workers': 0 is not in the range x>=1" in capsys.readouterr().err
