"""`mka serve-check` through the runner of the real engines, with programs of a few lines in their place."""

import json
import sys

import pytest
from support.engines import make_engine, make_serving, read_journal
from support.models import make_byte_tokenizer, make_tiny_model, save_model

from mka.cli.main import main
from mka.engines import ENGINES, loadable
from mka.engines.loadable import KEPT
from mka.engines.prompts import PROMPTS, draw_prompts, tokenize_prompts
from mka.export.ggml import ROUNDED
from mka.model.checkpoint import open_checkpoint
from mka.model.loading import load_tokenizer
from mka.recipe import QuantizeSettings
from mka.transforms.rtn import quantize_checkpoint

SHORT = ["--concurrency", "1,2", "--prompt-tokens", "8", "--new-tokens", "4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(make_tiny_model("llama", seed=seed), folder / name) for seed, name in enumerate(("new", "base"))]


@pytest.fixture(scope="module")
def prompts(models):
    return tokenize_prompts(load_tokenizer(models[0]), "models")


@pytest.fixture
def check(models, monkeypatch, work, capsys):
    """Run the command with an engine in vLLM's place; returns exit code, report, and what stderr says."""

    def run(engine, *options, model=models[0]):
        monkeypatch.setitem(ENGINES, engine.name, engine)
        arguments = ["serve-check", str(model), "--engine", engine.name, "--python", sys.executable]
        code = main(["--no-progress", *arguments, *SHORT, *options, "--json"])
        out, err = capsys.readouterr()
        assert not list(work.glob("*"))
        return code, json.loads(out) if out else None, err

    return run


def test_a_model_that_is_served_as_transformers_serves_it_passes(check, models, prompts, tmp_path):
    code, report, err = check(make_serving(tmp_path, models, prompts), "--base", str(models[1]), "--output", "x.json")
    assert (code, report["verdict"], report["reason"], err) == (0, "pass", None, "")
    assert report["format"] == "mka-serve/1" and report["engine"] == {"name": "vllm", "version": "1.0", "device": "cpu"}
    found = report["candidate"]
    assert found["agreement"]["same"] == found["agreement"]["prompts"] == len(PROMPTS) == 8
    assert found["kv_bytes_per_token"] == 64 and found["load_seconds"] == 0.5 and found["peak_bytes"] > 1e6
    # Of the program's times: 8 tokens until 0.5 s, then 3 more of each, a quarter of a second apart.
    assert found["speed"]["1"]["prefill_tokens_per_second"]["median"] == pytest.approx(16)
    assert found["speed"]["2"]["decode_tokens_per_second"] == {"median": 8.0, "least": 8.0, "most": 8.0, "n": 4}
    assert found["speed"]["2"]["first_token_seconds"]["median"] == 0.5
    # In turns, there and back; prompts are continued the first time.
    assert [(model.rpartition("/")[2], prompts) for model, prompts in read_journal(tmp_path)] == [
        ("new", 8),
        ("base", 8),
        ("base", 0),
        ("new", 0),
    ]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_relative_work_folder_is_found_by_the_engine(check, models, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("MKA_WORK", "work")
    code, report, err = check(make_serving(tmp_path, models[:1], prompts))
    assert (code, report["verdict"], err) == (0, "pass", "")


def test_the_report_is_kept_and_shown(check, models, prompts, tmp_path, capsys):
    engine = make_serving(tmp_path, models[:1], prompts)
    assert check(engine, "--output", "kept.json")[0] == 0
    assert json.loads((tmp_path / "here" / "kept.json").read_text())["verdict"] == "pass"
    assert check(engine, "--output", "kept.json")[0] == 2
    code = main(
        ["--no-progress", "serve-check", str(models[0]), "--engine", "vllm", "--python", sys.executable, *SHORT]
    )
    shown = capsys.readouterr().out
    assert code == 0 and "8 of 8 prompts" in shown and "decode, 2 at once" in shown and shown.endswith("pass\n")


def change_one(found):
    found[3]["tokens"][2] = (found[3]["tokens"][2] + 1) % 97
    return found


def test_another_token_is_a_fault(check, models, prompts, tmp_path):
    code, report, err = check(make_serving(tmp_path, models[:1], prompts, change=change_one))
    assert code == 1 and report["verdict"] == "fault" and "prompt 4: token 3" in err and err.count("\n") == 1
    assert report["candidate"]["agreement"]["same"] == 7


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("has no kernel", 1, "kernel for WNA16"),
        ("dies", 2, "assertion failed"),
        ("is killed", 2, "SIGKILL"),
        ("is not installed", 2, "No module named 'vllm'"),
        ("says memory", 2, "out of memory"),
        ("answers", 1, "continued 0 of 8 prompts"),
    ],
)
def test_nothing_that_goes_wrong_passes(check, tmp_path, body, code, said):
    got, report, err = check(make_engine(tmp_path, body), "--output", "told.json")
    assert got == code and said in err and err.startswith("mka: vllm") and err.count("\n") == 1
    assert report["verdict"] == {1: "fault", 2: "could not"}[code] and said in report["reason"]
    assert json.loads((tmp_path / "here" / "told.json").read_text())["verdict"] == report["verdict"]


def test_what_an_engine_says_of_the_base_is_no_fault_of_the_model(check, models, prompts, tmp_path):
    """It knows one model only, and fails on the other."""
    code, report, err = check(make_serving(tmp_path, models[:1], prompts), "--base", str(models[1]))
    assert code == 2 and report["verdict"] == "could not" and "so it was with the base" in err


def test_other_tokens_of_a_prompts_text_are_a_fault(check, models, prompts, tmp_path):
    engine = make_serving(tmp_path, models[:1], prompts)
    text = engine.path.read_text().replace("read=request", "read=[[1, *p] for p in request['prompts']] or request")
    code, _, err = check(make_engine(tmp_path, text))
    assert code == 1 and "prompt 1 is read as other tokens" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "vlm"], "did you mean 'vllm'"),
        (["--python", "gone"], "not installed"),
        (["--prompt-tokens", "900"], "need 904 positions, and the candidate has 128"),
        (["--concurrency", "1;2"], "is not N[,N…]"),
        (["--concurrency", "0"], "concurrency.0"),
        (["--rounds", "0"], "rounds"),
        (["--file-type", "q8_0"], "belongs to llama.cpp"),
        (["--gguf", "gone.gguf"], "loads the folder"),
        (["--engine", "llama.cpp", "--gguf", "gone.gguf"], "no such file"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(check, tmp_path, options, said):
    code, report, err = check(make_engine(tmp_path, "raise SystemExit('it ran')"), *options)
    assert code == 2 and report is None and said in err and err.count("\n") == 1


def test_an_engine_that_loads_a_file_gets_one(check, models, prompts, tmp_path, monkeypatch):
    """The writer is asked for the type of the arithmetic, and its file is what the program is given."""
    asked = []

    class Writer:
        @staticmethod
        def write_gguf(source, target, file_type):
            asked.append((source, file_type))
            (target / "made.gguf").write_text("x")
            return target / "made.gguf"

    monkeypatch.setitem(sys.modules, "mka.export.gguf", Writer)
    engine = make_engine(tmp_path, "answer(version=request['model'])", "llama.cpp", converts=True)
    code, report, err = check(engine)
    assert code == 1 and "continued 0" in err and asked == [(models[0], "f32")]
    assert report["engine"]["version"].endswith("/candidate/made.gguf")
    assert report["conditions"]["file_types"] == {"candidate": "f32"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model of which a GGUF file can be made."""
    model = make_tiny_model("llama", vocab_size=320, max_position_embeddings=512, num_hidden_layers=2)
    return save_model(model, tmp_path_factory.mktemp("whole") / "whole", tokenizer=make_byte_tokenizer())


def round_weights(base, folder, scheme):
    quantize_checkpoint(open_checkpoint(base), folder, QuantizeSettings(scheme=scheme, group_size=32))
    return folder


@pytest.mark.parametrize(("options", "beside"), [([], "f32"), (["--file-type", "q8_0"], "q8_0")])
def test_a_rounded_model_keeps_its_numbers_and_its_base_has_the_type_asked_for(
    options, beside, check, whole, tmp_path, capsys
):
    """An engine that answers nothing is at fault; each model was still handed to it as a file of its own type."""
    folder = round_weights(whole, tmp_path / "int8", "int8")
    engine = make_engine(tmp_path, "answer(version=request['model'])", "llama.cpp", converts=True)
    capsys.readouterr()
    code, report, err = check(engine, "--base", str(whole), *options, model=folder)
    assert code == 1 and "continued 0 of 8 prompts" in err
    assert report["conditions"]["file_types"] == {"candidate": KEPT, "base": beside}
    assert report["engine"]["version"].endswith("/candidate/int8-ROUNDED.gguf")
    tolerances = [report[role]["agreement"]["tolerance"] for role in ("candidate", "base")]
    assert tolerances == [loadable.choose_tolerance("float32", kind) for kind in (KEPT, beside)]
    assert "decode_tokens_per_second" in report["expected"]


def test_files_that_would_say_something_else_are_refused(check, whole, tmp_path, capsys):
    engine = make_engine(tmp_path, "raise SystemExit('it ran')", "llama.cpp", converts=True)
    rounded, inputs = (round_weights(whole, tmp_path / scheme, scheme) for scheme in ("int8", "w8a8"))
    for model, options, said in (
        (inputs, [], "goes into its products is rounded once per token"),
        (whole, ["--base", str(inputs)], "goes into its products is rounded once per token"),
        (whole, ["--file-type", "rounded"], "a rounded model gets it by itself"),
        (rounded, ["--file-type", "q8_0"], "of models that are not rounded"),
    ):
        capsys.readouterr()
        code, report, err = check(engine, *options, model=model)
        assert code == 2 and report is None and said in err and err.count("\n") == 1
    assert KEPT == ROUNDED


def test_tolerances_grow_with_what_is_rounded():
    exact, half, rounded = (
        loadable.choose_tolerance(*given) for given in (("float32", None), ("bfloat16", None), ("float32", "q8_0"))
    )
    assert exact == loadable.choose_tolerance("float32", "f32") < half < rounded
    assert loadable.choose_tolerance("float32", "bf16") == half


def test_timed_prompts_are_drawn_alike():
    first, second = (draw_prompts(3, 5, 97, seed=1) for _ in range(2))
    assert first == second != draw_prompts(3, 5, 97, seed=2)
    assert [len(prompt) for prompt in first] == [5, 5, 5] and max(map(max, first)) < 97
