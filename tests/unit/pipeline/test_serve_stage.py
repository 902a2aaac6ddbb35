"""Engines as a stage: asked after everything else was measured, judged by rules, shown on page and card."""

import json
import sys

import pytest
import yaml
from support.bench import TINY, make_bench_folder
from support.engines import make_engine

import mka.engines.serve
from mka.cli.main import main
from mka.engines import ENGINES
from mka.engines.agreement import Agreement
from mka.engines.serve import Served, ServeReport
from mka.errors import EngineError, RecipeError
from mka.pipeline.job import prepare
from mka.pipeline.pipeline import foresee, run
from mka.pipeline.recipes import validate_recipe
from mka.terminal import showing
from tasks.guards.doors import BEHIND

LOOKING = yaml.safe_load(TINY.read_text())["calibration"]
LOAD = {"metric": "engine", "engine": "vllm", "must": "load"}
FAST = {"metric": "decode_speed", "engine": "vllm", "least": 1.1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_bench_folder(tmp_path_factory.mktemp("serve") / "root")


def make_raw(root, *rules, **changes):
    raw = {
        "name": "tiny",
        "model": {"folder": str(root / "base")},
        "calibration": {**LOOKING, "path": str(root / LOOKING["path"]), "rev": None},
        "method": {"name": "random_deletion"},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "evaluation": {
            "text": str(root / "heldout.jsonl"),
            "overlap_index": None,
            "context": 32,
            "text_tokens": 128,
            "new_tokens": 4,
        },
        "engines": [{"engine": "vllm", "concurrency": [1, 2], "prompt_tokens": 8, "new_tokens": 4}],
        "gate": {"rules": list(rules)},
    }
    return raw | changes


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """Put a program of a few lines in vLLM's place."""

    def put(body):
        monkeypatch.setitem(ENGINES, "vllm", make_engine(tmp_path, body))
        monkeypatch.setenv("MKA_FAKE_PYTHON", sys.executable)

    return put


@pytest.fixture
def serves(monkeypatch, engine):
    """An engine that decodes the candidate 1.2 times as fast as the base with one prompt, and 1.15 times with two."""
    engine("answers")

    def side(factor):
        agreement = Agreement(8, 8, 8, 8, 0.0, 0.02, (), ())
        speed = {
            count: {"decode_tokens_per_second": {"median": 10 * (1 + factor * gain), "least": 1, "most": 9, "n": 2}}
            for count, gain in (("1", 0.2), ("2", 0.15))
        }
        return Served({"layers": 4}, agreement, 0.5, 6400, 64.0, 10**8, speed)

    told = {
        "dtype": "float32",
        "file_types": {"candidate": "rounded", "base": "f32"},
        "threads": 2,
        "prompt_tokens": 8,
        "new_tokens": 4,
    }
    asked = {"name": "vllm", "version": "9.9", "device": "cpu"}
    report = ServeReport(asked, "pass", None, side(1), side(0), {**told, "command": "x"})
    monkeypatch.setattr(mka.engines.serve, "check_serving", lambda *_, **__: report)


def walk(root, store, *rules, until=None):
    job = prepare(validate_recipe(make_raw(root, *rules)), root / "work")
    with showing(False):
        return job, run(job, lambda stage, job, found: stage.produce(job, found, store), until=until)


def test_what_an_engine_serves_is_judged_and_shown(root, serves, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_raw(root, LOAD, FAST)))
    assert main(["compress", "--recipe", str(recipe), "--output", str(tmp_path / "out"), "--json"]) == 0
    gate = json.loads(capsys.readouterr().out)["gate"]
    assert [(check["name"], check["verdict"]) for check in gate["checks"]] == [
        ("engine vllm", "pass"),
        ("decode_speed vllm", "pass"),
    ]
    # The slower of 1 and 2 prompts at once.
    assert gate["checks"][1]["value"] == pytest.approx(1.15)
    kept = json.loads((tmp_path / "out/evidence/engines.json").read_text())
    assert kept["vllm"]["verdict"] == "pass" and kept["vllm"]["format"] == "mka-serve/1"
    page, card = (tmp_path / "out/evidence/report.html").read_text(), (tmp_path / "out/README.md").read_text()
    for shown in (page, card):
        assert "In engines" in shown and "vllm 9.9" in shown and "decode, 2 at once" in shown and "1.150" in shown
        assert "weights in the file" in shown and "rounded" in shown and "f32" in shown
        assert "it makes of the candidate what transformers makes" in shown


def test_it_is_asked_once_and_again_of_another_model(root, serves, tmp_path):
    _, first = walk(root, tmp_path / "store", LOAD)
    _, again = walk(root, tmp_path / "store", LOAD, FAST)
    assert again["serve"].reused and again["serve"].key == first["serve"].key
    assert not again["gate"].reused
    facts = first["serve"].facts["vllm"]
    assert facts["loads"] and facts["ratios"]["decode_tokens_per_second"] == pytest.approx({"1": 1.2, "2": 1.15})


def test_what_an_engine_refuses_fails_the_gate(root, engine, tmp_path, capsys):
    engine("has no kernel")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_raw(root, LOAD)))
    assert main(["compress", "--recipe", str(recipe), "--output", str(tmp_path / "out")]) == 1
    assert "engine vllm does not load, needed must load" in capsys.readouterr().err
    page = (tmp_path / "out/evidence/report.html").read_text()
    assert "Failed to find a kernel for WNA16" in page
    job, found = walk(root, tmp_path / "store", LOAD)
    assert found["gate"].facts["verdict"] == "fail" and found["serve"].facts["vllm"]["ratios"]
    name, table, suite = BEHIND["serve"](job, found["serve"].folder, found["serve"].facts)
    assert name == "engines" and table["verdict"].tolist() == ["fault"] and suite


def test_what_could_not_be_told_is_not_stored(root, engine, tmp_path):
    engine("dies")
    with pytest.raises(EngineError, match="assertion failed: heads"):
        walk(root, tmp_path / "store", LOAD)
    assert not list((tmp_path / "store").glob("serve-*"))


def test_engines_that_cannot_be_asked_are_refused_before_anything_runs(root, monkeypatch, engine):
    engine("answers")
    monkeypatch.setenv("MKA_FAKE_PYTHON", "gone")
    with pytest.raises(EngineError, match="vllm is not installed"):
        prepare(validate_recipe(make_raw(root)), root / "work")
    rounded = make_raw(root, engines=[{"engine": "llama.cpp"}], quantize={"scheme": "w8a8"})
    with pytest.raises(RecipeError, match=r"llama\.cpp loads .* 'w8a8' rounds what goes into them once per token"):
        prepare(validate_recipe(rounded), root / "work")
    monkeypatch.setenv("MKA_LLAMA_CPP_PYTHON", sys.executable)
    prepare(validate_recipe(rounded | {"quantize": {"scheme": "int8", "group_size": 16}}), root / "work")
    kept = make_raw(root, engines=[{"engine": "llama.cpp", "file_type": "rounded"}])
    with pytest.raises(RecipeError, match=r"file_type 'rounded': a rounded model gets it by itself"):
        prepare(validate_recipe(kept), root / "work")


def test_it_is_foreseen_and_absent_where_no_engine_is_named(root, serves):
    job = prepare(validate_recipe(make_raw(root)), root / "work")
    facts = foresee(job, root / "out")
    assert "serve" in facts["stages"] and str(root / "out/evidence/engines.json") in facts["files"]
    bare = prepare(validate_recipe(make_raw(root, engines=[])), root / "work")
    assert "serve" not in foresee(bare, root / "out")["stages"]
