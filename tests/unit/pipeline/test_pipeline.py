"""The pipeline is told once: every way in walks the same stages under the same keys, and goes on where it was."""

import json
import signal
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
import yaml
from safetensors.torch import load_file
from support.bench import TINY, make_bench_folder

import mka.methods
import mka.model.checkpoint
import mka.pipeline.evaluate
import mka.pipeline.job
from mka.bench.cells import find_cell, run_cell
from mka.bench.prepare import prepare as prepare_bench
from mka.bench.recipe import load_bench
from mka.cli.main import main
from mka.pipeline.job import prepare
from mka.pipeline.pipeline import PIPELINE, run
from mka.pipeline.recipes import validate_recipe
from mka.terminal import showing

LOOKING = yaml.safe_load(TINY.read_text())["calibration"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a tiny model and its tables, and the work folder in it."""
    folder = make_bench_folder(tmp_path / "root")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MKA_WORK", str(folder / "work"))
    return folder


def make_recipe(root, **changes):
    raw = {
        "name": "tiny",
        "method": {"name": "mka"},
        "model": {"folder": str(root / "base")},
        "calibration": {**LOOKING, "rev": None},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "evaluation": {"text": "heldout.jsonl", "overlap_index": None, "context": 32, "text_tokens": 128},
    }
    return validate_recipe(raw | changes)


def compress(root, output, **changes):
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(root, **changes).model_dump(mode="json")))
    return main(["compress", "--recipe", str(recipe), "--output", str(root / output), "--json"])


def produce_in(store):
    return lambda stage, job, found: stage.produce(job, found, store)


def test_what_one_way_in_has_made_the_others_find(root, capsys):
    assert compress(root, "out") == 0
    raw = yaml.safe_load(TINY.read_text()) | {"methods": [{"name": "mka"}], "targets": [4]}
    (root / "bench.yaml").write_text(yaml.safe_dump(raw))
    bench = prepare_bench(load_bench(root / "bench.yaml"), root / "work", root=root)
    job = bench.jobs["mka at 4"]
    with showing(False):
        found = run(job, produce_in(bench.stages), until="merge")
    assert [name for name, product in found.items() if product.reused] == ["observe", "score", "plan", "merge"]
    # A cell takes that model, measures it, and leaves it where it was.
    (cell,) = bench.recipe.cells
    assert find_cell(bench, cell) is None
    with showing(False):
        run_cell(bench, cell)
    assert found["merge"].folder.is_dir() and find_cell(bench, cell) is not None


def test_what_a_comparison_has_made_compress_finds_except_the_model_it_removed(root, capsys):
    raw = yaml.safe_load(TINY.read_text()) | {"methods": [{"name": "mka"}], "targets": [4]}
    (root / "bench.yaml").write_text(yaml.safe_dump(raw))
    bench = prepare_bench(load_bench(root / "bench.yaml"), root / "work", root=root)
    with showing(False):
        run_cell(bench, bench.recipe.cells[0])
        assert not list(bench.stages.glob("merge-*")) and not list((root / "work/bench").glob("[!.]*"))
        found = run(prepare(make_recipe(root), root / "work"), produce_in(bench.stages), until="merge")
    assert {name: product.reused for name, product in found.items()} == {
        "observe": True,
        "score": True,
        "plan": True,
        "merge": False,
    }


def test_a_target_spelled_otherwise_is_the_same_plan(root):
    keys = set()
    for target in ({"layers": 4}, {"layer_ratio": 1 / 3}):
        job = prepare(make_recipe(root, target={**target, "protect_first": 1, "protect_last": 1}), root / "work")
        with showing(False):
            keys.add(run(job, produce_in(root / "stages"), until="plan")["plan"].key)
    assert len(keys) == 1


def test_scores_that_serve_another_plan_are_told_with_its_settings(root):
    assert compress(root, "out") == 0
    assert compress(root, "fixed", method={"name": "mka", "settings": {"weights": "fixed", "weight": 0.5}}) == 0
    assert len(list((root / "work/stages").glob("score-*"))) == 1
    first, second = (json.loads((root / name / "evidence/scores.json").read_text()) for name in ("out", "fixed"))
    assert [told["settings"].pop("weights") for told in (first, second)] == ["similarity", "fixed"]
    assert [told["settings"].pop("weight") for told in (first, second)] == [None, 0.5]
    assert first == second


def test_compress_goes_on_where_it_was_interrupted(root, capsys, monkeypatch):
    measure = mka.pipeline.evaluate.measure_checkpoint

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(mka.pipeline.evaluate, "measure_checkpoint", interrupt)
    assert compress(root, "out") == 130
    assert not (root / "out").exists()
    monkeypatch.setattr(mka.pipeline.evaluate, "measure_checkpoint", measure)
    before = {path: path.stat().st_ctime_ns for path in (root / "work/stages").glob("[!.]*")}
    assert sorted(path.name.rpartition("-")[0] for path in before) == ["merge", "observe", "plan", "score"]
    assert compress(root, "out") == 0
    assert {path: path.stat().st_ctime_ns for path in before} == before
    stored = next((root / "work/stages").glob("merge-*/model/model.safetensors"))
    assert load_file(root / "out/model.safetensors").keys() == load_file(stored).keys()


def test_compress_goes_on_after_a_kill_at_any_stage(root, capsys):
    """Killed as each stage begins, over and over; each run gets one stage further."""
    (root / "recipe.yaml").write_text(yaml.safe_dump(make_recipe(root).model_dump(mode="json")))
    code = textwrap.dedent("""
        import os, signal, sys
        from mka.pipeline import stage
        from mka.cli.main import main

        made, produce = 0, stage.produce

        def deadly(*args, **options):
            global made
            product = produce(*args, **options)
            if not product.reused and (made := made + 1) == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            return product

        stage.produce = deadly
        sys.exit(main(["compress", "--recipe", "recipe.yaml", "--output", "out"]))
    """)
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        codes.append(subprocess.run([sys.executable, "-c", code, "3"], cwd=root, capture_output=True).returncode)
        assert len(codes) < 6 and (root / "out").exists() == (codes[-1] == 0)
    assert codes[:-1] == [-signal.SIGKILL] * (len(codes) - 1) and codes[-1] == 0 and len(codes) == 4
    evidence = json.loads((root / "out/evidence/gate.json").read_text())
    assert evidence["verdict"] in ("pass", "fail", "undecided")


def test_nothing_is_resolved_or_opened_twice_in_a_run(root, monkeypatch):
    resolved, opened = [], []
    resolve, open_checkpoint = mka.methods.method_settings, mka.model.checkpoint.open_checkpoint

    def count_open(path, **options):
        opened.append(Path(path))
        return open_checkpoint(path, **options)

    recipe = make_recipe(root)
    monkeypatch.setattr(mka.methods, "method_settings", lambda *a, **o: (resolved.append(a[0]), resolve(*a, **o))[1])
    monkeypatch.setattr("mka.model.stock.open_checkpoint", count_open)
    for module in ("merge", "transform", "evaluate", "quantize", "control"):
        monkeypatch.setattr(f"mka.pipeline.{module}.open_checkpoint", count_open)
    with showing(False):
        run(prepare(recipe, root / "work"), produce_in(root / "work/stages"))
    assert resolved == ["mka"]
    assert opened.count(root / "base") == 1


def test_every_stage_is_told_once():
    names = [stage.name for stage in PIPELINE]
    assert len(set(names)) == len(names)
    assert names == [
        *("observe", "score", "plan", "merge", "heal", "transform", "quantize"),
        *("control", "evaluate base", "evaluate candidate", "evaluate control", "compare speed", "serve"),
        *("gate", "report"),
    ]


def test_no_module_imports_itself_by_a_way_round():
    graph = grimp.build_graph("mka")
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def test_the_top_of_the_library_has_six_files_at_most():
    files = [path.name for path in (Path(mka.methods.__file__).parents[1]).glob("*.py")]
    assert len(files) <= 6, files
