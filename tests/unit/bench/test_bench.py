"""The comparison itself on a tiny model: what it measures, keeps, resumes, and how it fails."""

import json
from pathlib import Path

import pytest
import yaml
from support.bench import TINY, make_bench_folder, write_bench_recipe
from support.models import make_texts

import mka.bench.measure
import mka.bench.run
import mka.healing.heal
import mka.pipeline.merge
from mka.bench.cells import find_base, find_cell
from mka.bench.page import render_page
from mka.bench.prepare import prepare
from mka.bench.recipe import load_bench
from mka.bench.run import EXPECTED, foresee_bench, run_bench
from mka.bench.statistics import Comparison
from mka.cli.main import main
from mka.errors import CalibrationError, NumericsError, RecipeError
from mka.evaluation.generation import measure_repetition
from mka.evaluation.metrics import Subject
from mka.evaluation.perplexity import measure_perplexity
from mka.evidence.oracles import Loss
from mka.model.checkpoint import open_checkpoint
from mka.model.loading import load_model
from mka.pipeline.merge import write_merged
from mka.pipeline.pipeline import run as run_pipeline
from mka.plan.plan import MergePlan, keep_layers
from mka.recipe import EvaluationSettings
from mka.terminal import showing

CELLS = ["sleb at 5", "sleb at 4", "mka at 5", "mka at 4"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_bench_folder(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def quiet():
    with showing(False):
        yield


@pytest.fixture
def root(inputs, tmp_path, monkeypatch):
    """A folder of its own with the shared model and texts in it; the command line runs there."""
    for item in inputs.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))
    return tmp_path


def open_bench(root, **changes):
    return prepare(load_bench(write_bench_recipe(root, **changes)), root / "work", root=root, command="mka bench tiny")


def run(root, only=None, **changes):
    return run_bench(open_bench(root, **changes), only=only, say=lambda line: None)


@pytest.fixture
def written(monkeypatch):
    """Names of the methods whose candidates were written."""
    plans, write = [], write_merged
    monkeypatch.setattr(
        mka.pipeline.merge,
        "write_merged",
        lambda plan, *rest: (plans.append((plan.method, plan.layers_out)), write(plan, *rest))[1],
    )
    return plans


@pytest.fixture
def measured(monkeypatch):
    """Names of the texts that were measured."""
    names = []
    measure_text = mka.bench.measure.MeasuredModel.measure_text

    def count(self, metric, name, folder):
        names.append(name)
        return measure_text(self, metric, name, folder)

    monkeypatch.setattr(mka.bench.measure.MeasuredModel, "measure_text", count)
    return names


def test_a_cell_is_what_the_stages_make_by_themselves_and_leaves_no_model_behind(root, tmp_path):
    results = run(root)
    assert [m.cell.key for m in results.measured] == CELLS and not results.failed and not results.missing
    assert {path.name for path in (root / "work").rglob("*.safetensors")} == {"states.safetensors"}
    bench = results.bench
    cell = results.measured[1]
    plans = [MergePlan.load(path) for path in (root / "work/stages").glob("plan-*/plan.json")]
    (plan,) = (plan for plan in plans if plan.method == "sleb" and plan.layers_out == 4)
    assert plan.layers == keep_layers([i for i in range(6) if i not in plan.removed])
    write_merged(plan, open_checkpoint(root / "base"), tmp_path / "again")
    for folder, found in ((root / "base", results.base), (tmp_path / "again", cell)):
        model, tokenizer = load_model(folder, "float32")
        for name, texts in bench.texts.items():
            expected = measure_perplexity(model, tokenizer, texts, name=name, context=32, max_tokens=256)
            assert found.scores[name, "perplexity"].value == pytest.approx(expected.value, rel=1e-6)
            assert [n for _, n in found.scores[name, "perplexity"].items] == [n for _, n in expected.items]
    ratio = Comparison(results).ratios["perplexity prose"]["sleb", 4].value
    assert ratio == pytest.approx(
        cell.scores["prose", "perplexity"].value / results.base.scores["prose", "perplexity"].value
    )


def test_a_second_run_does_nothing_and_finds_the_same(root, written, measured):
    first = run(root)
    assert len(written) == 4 and len(measured) == 2 * 5
    written.clear(), measured.clear()
    second = run(root)
    assert not written and not measured
    assert all(m.reused for m in (second.base, *second.measured))
    assert Comparison(second).ratios == Comparison(first).ratios


def test_generation_is_measured_of_the_base_and_at_its_targets_and_found_again(root):
    changes = {"evaluation": {"text_tokens": 256, "context": 64, "generation": 3, "task_targets": [4]}}
    first = run(root, **changes)
    assert not first.failed
    asked = [("sequences", "copying"), ("passages", "retrieval"), ("continuations", "repetition")]
    for found in (first.base, *first.measured):
        whole = found.cell is None or found.cell.layers == 4
        assert [key for key in found.scores if key in asked] == (asked if whole else [])
    model, tokenizer = load_model(root / "base", "float32")
    settings = EvaluationSettings(generation=3, context=64)
    (expected,) = measure_repetition(Subject(model, tokenizer, settings, {}, {}, progress=False))
    assert first.base.scores["continuations", "repetition"].items == pytest.approx(expected.items)
    assert all(m.reused for m in (lambda again: (again.base, *again.measured))(run(root, **changes)))
    more = run(root, **{"evaluation": {**changes["evaluation"], "generation": 4}})
    assert more.base.scores["passages", "retrieval"].n == 4


def test_a_run_killed_between_cells_keeps_the_earlier_ones(root, written, monkeypatch):
    attempt, done = mka.bench.run.attempt_cell, []

    def die(bench, cell):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell)
        return attempt(bench, cell)

    monkeypatch.setattr(mka.bench.run, "attempt_cell", die)
    with pytest.raises(KeyboardInterrupt):
        run(root)
    monkeypatch.setattr(mka.bench.run, "attempt_cell", attempt)
    assert written == [("sleb", 5), ("sleb", 4)]
    bench = open_bench(root)
    assert [find_cell(bench, cell) is not None for cell in bench.recipe.cells] == [True, True, False, False]
    run(root)
    assert written == [("sleb", 5), ("sleb", 4), ("mka", 5), ("mka", 4)]


def test_a_run_killed_while_measuring_merges_again_and_measures_the_rest_only(root, written, measured):
    results = run(root, only="sleb")
    forget_measurement(root, results.measured[1])
    written.clear(), measured.clear()
    results = run(root, only="sleb")
    assert written == [("sleb", 4)] and len(measured) == 1
    assert len(results.measured) == 2 and not list((root / "work/bench").glob("[!.]*"))


def forget_measurement(root, found):
    """Remove one stored measurement of a cell."""
    manifests = [path / "stage.json" for path in (root / "work/stages").glob("bench-text-*")]
    inputs = {path: json.loads(path.read_text())["inputs"] for path in manifests}
    next(path for path in manifests if inputs[path]["checkpoint"] == found.facts["digest"]).unlink()


def test_merging_again_to_other_bytes_measures_everything_of_the_cell_again(root, measured, monkeypatch):
    stored = run(root, only="sleb").measured[1]
    forget_measurement(root, stored)
    measured.clear()
    write = write_merged

    def write_other(plan, checkpoint, output, *rest):
        loaded = write(plan, checkpoint, output, *rest)
        config = json.loads((output / "config.json").read_text())
        (output / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
        return loaded

    monkeypatch.setattr(mka.pipeline.merge, "write_merged", write_other)
    again = run(root, only="sleb").measured[1]
    # The first was about to be measured when the bytes turned out to be others.
    assert sorted(measured[1:]) == ["prose", "words"]
    assert again.facts["digest"] != stored.facts["digest"]
    assert again.scores["words", "perplexity"].value != stored.scores["words", "perplexity"].value


def test_changed_settings_and_added_methods_run_their_own_cells_only(root, written, measured):
    run(root)
    written.clear(), measured.clear()
    methods = [{"name": "sleb"}, {"name": "mka", "settings": {"coordinates": 1}, "ours": True}, {"name": "shortgpt"}]
    run(root, methods=methods)
    assert sorted(written) == [("mka", 4), ("mka", 5), ("shortgpt", 4), ("shortgpt", 5)]
    written.clear(), measured.clear()
    # What only searches look at decides only their plans; the plans may come out the same, and are then not measured.
    run(root, methods=methods, calibration={**yaml.safe_load(TINY.read_text())["calibration"], "search_tokens": 80})
    assert {method for method, _ in written} <= {"sleb"}
    written.clear(), measured.clear()
    run(root, methods=methods, evaluation={"text_tokens": 128, "context": 32})
    assert set(measured) == {"words", "prose"} and {method for method, _ in written} == {"sleb", "mka", "shortgpt"}


def test_targets_of_one_method_share_their_search(root, monkeypatch):
    tried, measure = [], Loss.measure
    monkeypatch.setattr(Loss, "measure", lambda self, layers: (tried.append(tuple(layers)), measure(self, layers))[1])
    run(root, only="sleb")
    # Protected are 1 + 1 of 6: 4 trials for the first layer, 3 for the second, none of them twice.
    assert len(tried) == 4 + 3 and len(set(tried)) == len(tried)


def test_a_target_out_of_reach_is_a_failed_cell_and_the_run_goes_on(root, capsys):
    recipe = write_bench_recipe(root, methods=[{"name": "uidl", "targets": [1]}, {"name": "sleb", "targets": [5]}])
    assert main(["bench", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "uidl at 1 failed: target of 1 layers cannot be reached" in out
    page = Path("docs/benchmarks.md").read_text()
    assert "## What failed" in page and "| uidl | – | failed |" in page


@pytest.mark.parametrize(("error", "code"), [(NumericsError("not finite"), 0), (RuntimeError("a mistake"), 1)])
def test_only_failures_that_are_no_limit_of_a_method_set_the_exit_code(root, capsys, monkeypatch, error, code):
    write = write_merged

    def fail(plan, *rest):
        if plan.layers_out == 5:
            raise error
        return write(plan, *rest)

    monkeypatch.setattr(mka.pipeline.merge, "write_merged", fail)
    assert main(["bench", str(write_bench_recipe(root)), "--json"]) == code
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert [(f["row"], f["layers"]) for f in document["failed"]] == [("sleb", 5), ("mka", 5)]
    assert all(str(error) in f["reason"] and f["expected"] is isinstance(error, EXPECTED) for f in document["failed"])
    assert [(c["row"], c["layers"]) for c in document["cells"]] == [("sleb", 4), ("mka", 4)]
    lines = said.err.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["base", "1/4", "2/4", "3/4", "4/4"]  # a line per cell
    assert len(lines) == 5 + code and ("2 of 4 cells failed unexpectedly" in said.err) == bool(code)


def test_a_text_that_was_calibrated_on_is_refused_before_anything_runs(root):
    texts = [{"name": "own", "path": "calibration.jsonl", "seen": True}]
    with pytest.raises(CalibrationError, match=r"text 'own' and the calibration table: 60 of 60"):
        open_bench(root, texts=texts)
    row = json.loads((root / "calibration.jsonl").read_text().split("\n")[3])
    (root / "quote.txt").write_text(f"Title\n\n{row['text']}\n\nEnd")
    with pytest.raises(CalibrationError, match=r"text 'quote' and the calibration table: 1 of 60"):
        open_bench(root, texts=[{"name": "quote", "path": "quote.txt", "seen": True}])


def test_absent_texts_and_sources_are_refused_in_one_line_that_says_where_to_get_them(root, capsys):
    recipe = write_bench_recipe(root, texts=[{"name": "a", "path": "a.txt", "seen": True, "origin": "ask Ann for it"}])
    assert main(["bench", str(recipe)]) == 2
    assert capsys.readouterr().err == "mka: text 'a': there is no file a.txt: ask Ann for it\n"
    with pytest.raises(CalibrationError, match="no rows of source 'x'; sources: words"):
        open_bench(root, texts=[{"name": "a", "path": "heldout.jsonl", "source": "x", "seen": True}])


def test_impossible_targets_and_contexts_are_refused_before_anything_runs(root):
    with pytest.raises(RecipeError, match="target of 9 layers: the model has 6"):
        open_bench(root, targets=[9])
    with pytest.raises(RecipeError, match="the model has 128 positions"):
        open_bench(root, evaluation={"context": 200})
    with pytest.raises(RecipeError, match="fits its own correction"):
        methods = [{"name": "replaceme", "alignment": [True]}]
        open_bench_with_alignment(root, methods)


def open_bench_with_alignment(root, methods):
    return open_bench(root, methods=methods)


def test_alignment_is_handed_its_texts_by_source_and_tells_its_cost(root, monkeypatch):
    calls = []

    write = write_merged

    def write_aligned(plan, checkpoint, output, folds, alignment, source):
        loaded = write(plan, checkpoint, output)
        if alignment is None:
            return loaded
        calls.append((plan.layers_out, list(alignment.texts), alignment.settings.enabled, source.dtype))
        fit = {"tokens": 2048, "teacher_seconds": 2.0, "seconds": 5.0, "probe_seconds": 0.5}
        return loaded | {"alignment": fit}

    monkeypatch.setattr(mka.pipeline.merge, "write_merged", write_aligned)
    methods = [{"name": "mka", "alignment": [False, True], "targets": [5]}]
    fitted = {"path": "alignment.jsonl", "context": 16, "tokens": 512, "penalty": 1.0}
    results = run(root, methods=methods, alignment=fitted)
    assert calls == [(5, ["words"], True, "float32")]
    assert [m.cell.row for m in results.measured] == ["mka", "mka, aligned"]
    assert set(results.measured[1].seconds) == {"observe", "score", "plan", "align", "measure"}
    page = render_page(Comparison(results), None)
    assert "| mka, aligned | 5 | 2,048 | 2.000 | 5.000 | 0.5000 | 2.75 |" in page
    # Other texts to align on are another candidate; the plain one stays.
    (root / "alignment.jsonl").unlink()
    rows = [json.dumps({"text": text, "source": "more"}) for text in make_texts(60, seed=9)]
    (root / "alignment.jsonl").write_text("\n".join(rows) + "\n")
    run(root, methods=methods, alignment=fitted)
    assert [sources for _, sources, *_ in calls] == [["words"], ["more"]]


def test_an_alignment_that_the_model_has_no_positions_for_is_refused_before_anything_is_run(root):
    methods = [{"name": "mka", "alignment": [True], "targets": [5]}]
    with pytest.raises(RecipeError, match=r"alignment\.context is 512; the model has 128 positions"):
        open_bench(root, methods=methods, alignment={"path": "alignment.jsonl"})


HEAL = {"context": 16, "heldout_tokens": 256, "rate": 3e-3}


def test_healing_is_an_axis_and_a_healed_cell_goes_on_from_the_merged_one(root, monkeypatch):
    rows = [
        json.dumps({"text": text, "source": f"source {number % 2}"})
        for number, text in enumerate(make_texts(200, seed=9))
    ]
    (root / "two.jsonl").write_text("\n".join(rows) + "\n")
    changes = {
        "heal": {"path": "two.jsonl", **HEAL},
        "methods": [{"name": "sleb", "heal": [0, 512, 1024]}],
        "targets": [4],
    }
    found = run(root, **changes)
    assert [m.cell.row for m in found.measured] == [
        "sleb",
        "sleb, healed on 512 tokens",
        "sleb, healed on 1,024 tokens",
    ]
    plain, short, long = found.measured
    assert plain.facts["digest"] != short.facts["digest"] != long.facts["digest"]
    assert short.facts["healing"]["start"] == pytest.approx(long.facts["healing"]["start"], rel=1e-6)
    assert long.facts["healing"]["tokens"] == 1024 and "heal" in long.seconds and "heal" not in plain.seconds
    assert not list((root / "work" / "stages").glob("merge-*")) and not list((root / "work" / "stages").glob("heal-*"))
    monkeypatch.setattr(mka.healing.heal, "heal_checkpoint", lambda *_, **__: pytest.fail("healed twice"))
    again = run(root, **changes)
    assert [m.scores for m in again.measured] == [m.scores for m in found.measured]
    assert all(m.reused for m in again.measured)
    # The stage by itself makes the same model.
    monkeypatch.undo()
    bench = open_bench(root, **changes)
    job = bench.jobs["sleb, healed on 512 tokens at 4"]
    made = run_pipeline(job, lambda stage, job, found: stage.produce(job, found, root / "own"), until="heal")
    assert made["heal"].facts["digest"] == short.facts["digest"]


def test_rounding_is_an_axis_with_sizes_and_a_rounded_cell_goes_on_from_the_merged_one(root, monkeypatch):
    rounded = {"scheme": "int3", "group_size": 16, "rounding": "gptq", "tokens": 512}
    changes = {
        "methods": [{"name": "uidl", "quantize": [{"scheme": "off"}, {"scheme": "int8", "group_size": 16}, rounded]}],
        "targets": [6, 4],
        "output": "page.md",
    }
    found = run(root, **changes)
    rows = ["uidl", "uidl, int8 in groups of 16", "uidl, int3 in groups of 16, gptq on at most 512 tokens"]
    assert [(m.cell.row, m.cell.layers) for m in found.measured] == [(row, n) for n in (6, 4) for row in rows]
    whole, cut = found.measured[:3], found.measured[3:]
    for plain, eight, three in (whole, cut):
        assert plain.facts["bytes"] > eight.facts["bytes"] > three.facts["bytes"]
        assert "quantize" in eight.seconds and "quantize" not in plain.seconds
    # All layers kept and nothing rounded is the base.
    assert whole[0].facts["bytes"] == found.base.facts["bytes"]
    assert [score.value for score in whole[0].scores.values()] == pytest.approx(
        [s.value for s in found.base.scores.values()]
    )
    assert not [left for kind in ("merge", "quantize") for left in (root / "work/stages").glob(f"{kind}-*")]
    monkeypatch.setattr("mka.pipeline.quantize.write_quantized", lambda *_, **__: pytest.fail("rounded twice"))
    again = run(root, **changes)
    assert [m.scores for m in again.measured] == [m.scores for m in found.measured]
    page = render_page(Comparison(found), None)
    sizes = page.partition("## Sizes")[2].partition("## Costs")[0]
    for row, *values in zip(rows, whole, cut):
        shown = [f"{m.facts['bytes'] / 1e6:.1f} ({m.facts['bytes'] / found.base.facts['bytes']:.3f})" for m in values]
        assert f"| {row} | {shown[0]} | {shown[1]} |" in sizes


def test_a_rounding_that_cannot_be_is_refused_before_anything_runs(root):
    for quantize, said in (
        ([{"scheme": "int8", "group_size": 24}], "does not divide"),
        ([{"scheme": "mixed", "rounding": "gptq", "bits_per_weight": 1, "group_size": 16}], "weights take"),
        ([{"scheme": "int8"}, {"scheme": "int8"}], "names the same twice"),
    ):
        with pytest.raises(RecipeError, match=said):
            open_bench(root, methods=[{"name": "uidl", "quantize": quantize}])


def test_a_dry_run_lists_cells_and_runs_nothing(root, capsys):
    recipe = str(write_bench_recipe(root))
    assert main(["bench", recipe, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [f"{c['cell']} at {c['layers']}" for c in document["cells"]] == ["base at 6", *CELLS]
    assert document["to_do"] == 5 and document["seconds"] > 0 and not (root / "work/stages").exists()
    run(root, only="mka")
    foreseen = foresee_bench(open_bench(root), None)
    assert [cell["stored"] for cell in foreseen] == [True, False, False, True, True]
    assert all(bool(cell["seconds"]) != cell["stored"] for cell in foreseen)
    assert main(["bench", recipe, "--dry-run"]) == 0
    assert "2 of 5 to do" in capsys.readouterr().out


def test_a_dry_run_marks_the_cells_that_the_run_cannot_reach(root, capsys):
    small = {"name": "policy_gradient", "settings": {"budget": 10}, "targets": [5]}
    changes = {"targets": [2, 5], "methods": [{"name": "sleb"}, {"name": "mka"}, small]}  # first and last protected
    recipe = str(write_bench_recipe(root, **changes))
    assert main(["bench", recipe, "--dry-run", "--json"]) == 0
    cells = {f"{c['cell']} at {c['layers']}": c["refusal"] for c in json.loads(capsys.readouterr().out)["cells"]}
    refused = {name: refusal for name, refusal in cells.items() if refusal}
    assert list(refused) == ["mka at 2", "policy_gradient (budget=10) at 5"]
    assert main(["bench", recipe, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert cells["mka at 2"] in shown and shown.count("not reached") == 2 and "4 of 6 to do" in shown
    failed = run(root, **changes).failed
    assert {one.cell.key: one.reason for one in failed} == refused and all(one.expected for one in failed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"context": 64, "text_tokens": 64}}, "windows of 64 tokens, at least 2 are needed"),
        (
            {"evaluation": {"context": 16, "text_tokens": 256, "generation": 2, "task_targets": [4]}},
            "facts and a question are",
        ),
        ({"methods": [{"name": "sleb", "heal": [0, 100]}]}, "different numbers of tokens from 512 on"),
    ],
)
def test_what_would_fail_every_cell_is_refused_before_any_is_run(root, capsys, changes, message):
    recipe = str(write_bench_recipe(root, **changes))
    for options in (["--dry-run"], []):
        assert main(["bench", recipe, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (root / "work/stages").exists()


def test_only_names_a_method_of_the_recipe(root, capsys):
    assert main(["bench", str(write_bench_recipe(root)), "--only", "slep"]) == 2
    assert "no method 'slep' (did you mean 'sleb'?)" in capsys.readouterr().err
    results = run(root, only="mka")
    assert [cell.key for cell in results.missing] == CELLS[:2]


def test_leftovers_of_killed_runs_are_removed_and_folders_in_use_are_not(root):
    from filelock import FileLock

    from mka.bench.cells import sweep_leftovers

    for name in ("dead", "alive"):
        (root / "work/bench" / name / "model").mkdir(parents=True)
    with FileLock(root / "work/bench/.alive.lock"):
        sweep_leftovers(root / "work")
    assert [path.name for path in (root / "work/bench").glob("[!.]*")] == ["alive"]


def test_nothing_is_stored_of_the_base_before_it_is_measured(root):
    bench = open_bench(root)
    assert find_base(bench) is None
    run(root, only="mka")
    assert find_base(bench).reused
