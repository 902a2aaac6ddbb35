"""The command line does what the library does, says what it did, and starts fast."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file
from support.lines import split_stages
from support.models import LAYERS, make_texts, make_tokenizer

import mka.pipeline.evaluate
from mka.cli.main import cli, main
from mka.cli.options import read_settings, read_tasks
from mka.evaluation.perplexity import measure_perplexity
from mka.evaluation.scores import EvalReport
from mka.methods import get_method, method_names
from mka.model.loading import load_model
from mka.pipeline.recipes import load_recipe
from mka.plan.plan import MergePlan
from mka.store.sums import file_sha256, verify_sums

ROOT = Path(__file__).parents[3]
SAMPLES = 60
HEAVY = {"torch", "transformers", "pandas", "scipy", "matplotlib", "datasets", "lm_eval", "mlflow", "prefect"}
STAGES = (
    *(
        "inspect",
        "init",
        "recipe",
        "compress",
        "methods",
        "tasks",
        "write",
        "observe",
        "score",
        "plan",
        "merge",
        "heal",
    ),
    *("evaluate", "chat", "compare", "report", "export", "serve-check", "sign", "verify", "publish", "bench"),
    *("budget", "frontier", "clean", "completion"),
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for name, seed in (("calibration", 0), ("heldout", 1)):
        rows = [json.dumps({"text": text, "source": "words"}) for text in make_texts(SAMPLES, seed=seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def mka_(capsys):
    """Run a command that must go well; returns stdout."""

    def run(*arguments, code=0):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        assert code or split_stages(err)[1] == ""
        return out

    return run


@pytest.fixture
def compress_arguments(llama_folder, tables):
    arguments = [
        "compress",
        llama_folder,
        "--method",
        "mka",
        "--calibration",
        tables / "calibration.jsonl",
        "--samples",
        SAMPLES,
    ]
    return [*arguments, "--text", tables / "heldout.jsonl", "--context", 32, "--layers", 4]


def list_tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "--json"], ["compress", "--help"]])
def test_start_imports_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mka.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & HEAVY


def test_a_refusal_sets_the_exit_code_of_the_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mka.cli.main", "merge", "nowhere", "--plan", "nowhere.json", "--output", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mka: plan nowhere.json cannot be read") and done.stderr.count("\n") == 1


def test_help_teaches_with_an_example_and_describes_every_option(mka_):
    assert tuple(cli.commands) == STAGES
    for name in STAGES:
        page = mka_(name, "--help")
        assert f"mka {name}" in page.split("Example", 1)[1]
        options = [p for p in cli.commands[name].params if isinstance(p, click.Option)]
        assert "--json" in page and all(option.help for option in options)
    assert "mka compress" in mka_() and mka_() == mka_("--help")
    assert mka_("--version").strip() == f"mka, version {mka.__version__}"


def test_methods(mka_):
    table = mka_("methods")
    entries = json.loads(mka_("methods", "--json"))["methods"]
    assert [entry["name"] for entry in entries] == method_names()
    for entry in entries:
        assert entry["name"] in table and entry["summary"] in table
        assert [s["name"] for s in entry["settings"]] == list(get_method(entry["name"]).settings.model_fields)
        assert all(s["description"] for s in entry["settings"])
    assert {e["name"]: e["needs"] for e in entries}["reference_code"] == []


def test_the_stages_one_by_one_make_what_compress_makes(mka_, compress_arguments, llama_folder, tables, tmp_path):
    states, scores, plan = (tmp_path / name for name in ("states.safetensors", "scores.json", "plan.json"))
    calibration = ["--calibration", tables / "calibration.jsonl", "--samples", SAMPLES]
    observed = json.loads(mka_("observe", llama_folder, *calibration, "--output", states, "--json"))
    texts = make_tokenizer()(make_texts(SAMPLES))["input_ids"]
    assert observed["tokens"] == sum(map(len, texts)) and observed["layers"] == LAYERS
    scored = json.loads(
        mka_("score", llama_folder, "--method", "mka", "--states", states, "--output", scores, "--json")
    )
    planned = mka_("plan", llama_folder, "--scores", scores, "--layers", 4, "--output", plan)
    assert f"{LAYERS} layers become 4" in planned and planned.count("became one") == 2
    mka_("merge", llama_folder, "--plan", plan, "--output", tmp_path / "merged")
    reports = {}
    for role, folder in (("base", llama_folder), ("candidate", tmp_path / "merged")):
        reports[role] = tmp_path / f"{role}.json"
        text = ["--text", tables / "heldout.jsonl", "--context", 32]
        mka_("evaluate", folder, *text, "--output", reports[role])
    judged = ["report", "--plan", plan, "--base", reports["base"], "--candidate", reports["candidate"]]
    verdict = json.loads(mka_(*judged, "--scores", scores, "--output", tmp_path / "report", "--json"))
    assert list_tree(tmp_path / "report") == ["README.md", "report.html"]

    whole = json.loads(mka_(*compress_arguments, "--output", tmp_path / "whole", "--json"))
    evidence = tmp_path / "whole" / "evidence"
    assert json.loads((evidence / "scores.json").read_text())["values"] == scored["values"]
    assert MergePlan.load(evidence / "plan.json") == MergePlan.load(plan)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for role, path in reports.items():
        assert EvalReport.load(evidence / f"{role}.json").scores == EvalReport.load(path).scores
    assert whole["gate"] == verdict["gate"]


def test_compress_publishes_a_stock_folder_with_its_evidence(mka_, compress_arguments, tmp_path):
    output = tmp_path / "results" / "out"
    said = mka_(*compress_arguments, "--quantize", "int8", "--group-size", 32, "--output", output)
    names = ("base.json", "candidate.json", "control.json", "gate.json", "plan.json")
    names += ("recipe.yaml", "report.html", "scores.json")
    files = {f for f in list_tree(output) if "/" in f}
    assert files == {f"evidence/{name}" for name in names}
    assert list_tree(output.parent)[0] == "out" and len(list(output.parent.iterdir())) == 1
    assert verify_sums(output)
    assert load_recipe(output / "evidence" / "recipe.yaml").quantize.group_size == 32

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    ids = AutoTokenizer.from_pretrained(output)("w5 w6 w7", return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 7)

    decision = json.loads((output / "evidence" / "gate.json").read_text())
    card = (output / "README.md").read_text()
    assert f"Gate: **{decision['verdict']}**" in card and f"gate: {decision['verdict']}" in said
    candidate = EvalReport.load(output / "evidence" / "candidate.json")
    assert candidate.checkpoint["path"] == str(output)
    assert candidate.checkpoint["parameters"] == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith((".weight", ".bias"))
    )


@pytest.mark.parametrize(
    ("scheme", "rounding", "tolerance"), [("off", "nearest", 0.0), ("int4", "nearest", 0.05), ("int3", "gptaq", 0.05)]
)
def test_a_dry_run_foresees_what_happens_and_writes_nothing(
    mka_, compress_arguments, tmp_path, monkeypatch, scheme, rounding, tolerance
):
    monkeypatch.chdir(tmp_path)
    rounded = ["--quantize", scheme, "--group-size", 32, "--rounding", rounding]
    arguments = [*compress_arguments, *rounded, "--output", "out"]
    assert "nothing was written" in mka_(*arguments, "--dry-run")
    facts = json.loads(mka_(*arguments, "--dry-run", "--json"))
    assert not list(tmp_path.iterdir())
    assert facts["calibration_tokens"] == sum(map(len, make_tokenizer()(make_texts(SAMPLES))["input_ids"]))
    made = json.loads(mka_(*arguments, "--json"))
    assert {key: made["base"][key] for key in facts["base"]} == facts["base"]
    assert facts["candidate"]["layers"] == made["candidate"]["layers"] == 4
    assert facts["candidate"]["parameters"] == made["candidate"]["parameters"]
    assert facts["candidate"]["bytes"] == pytest.approx(made["candidate"]["bytes"], rel=tolerance, abs=1)
    assert all(Path(file).is_file() for file in facts["files"])


def test_mixed_bits_are_foreseen_at_most_and_told_of_in_card_and_report(
    mka_, compress_arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    mixed = ["--quantize", "mixed", "--rounding", "gptq", "--bits-per-weight", "4.5", "--group-size", 32]
    arguments = [*compress_arguments, *mixed, "--output", "out"]
    foreseen = json.loads(mka_(*arguments, "--dry-run", "--json"))["candidate"]["bytes"]
    made = json.loads(mka_(*arguments, "--json"))["candidate"]["bytes"]
    assert 0.9 * foreseen < made <= foreseen
    card, report = ((tmp_path / "out" / name).read_text() for name in ("README.md", "evidence/report.html"))
    said = "mixed 4.5 bits per weight in groups of 32, gptq on at most 32,768 tokens"
    for page in (card, report):
        assert said in page and "tokens of calibration text in windows of 128" in page
        assert re.search(r"int\d [\d.]+%, int\d [\d.]+%", page)
    # Which engine has kernels for every number of bits that is in it.
    assert re.search(r"vLLM on CPU .*: no, it has weight-only kernels for 4 bits alone", card)
    assert "where mixed is unpacked to floating point" in card


def test_too_little_text_for_a_rounding_is_refused_before_anything_runs(
    capsys, compress_arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": f"w{i}"}) + "\n" for i in range(3, 63)))
    at = compress_arguments.index("--calibration")
    arguments = [*compress_arguments[: at + 1], tmp_path / "short.jsonl", *compress_arguments[at + 2 :]]
    arguments += ["--quantize", "int4", "--group-size", 32, "--rounding", "gptq", "--output", "out", "--dry-run"]
    assert main([str(argument) for argument in arguments]) == 2
    assert "the calibration texts make no window of 128 tokens; give more text" in capsys.readouterr().err


def test_generation_needs_no_table_and_a_gate_without_rules_does_not_judge_it(
    capsys, compress_arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    at = compress_arguments.index("--text")
    arguments = [str(a) for a in compress_arguments[:at] + compress_arguments[at + 2 :]]
    assert main([*arguments, "--generation", "2", "--context", "64", "--output", "out"]) == 0
    out, err = capsys.readouterr()
    assert "note:" not in err and "repetition, continuations (n = 2 items)" in out
    assert "gate: not asked, nothing it judges was measured" in out
    evidence = tmp_path / "out" / "evidence"
    assert not (evidence / "gate.json").exists()
    for role in ("base", "candidate"):
        scores = json.loads((evidence / f"{role}.json").read_text())["scores"]
        assert [score["metric"] for score in scores] == ["copying", "retrieval", "repetition"]
    assert main(["evaluate", "out", "--generation", "2", "--context", "64", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["scores"]
    assert [score["items"] for score in again] == [score["items"] for score in scores]


def test_nothing_to_measure_is_said_and_published_all_the_same(capsys, compress_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = compress_arguments.index("--text")
    arguments = [str(a) for a in compress_arguments[:at] + compress_arguments[at + 2 :]]
    assert main([*arguments, "--output", "out"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: nothing will be measured") and "gate: not asked" in out
    assert main([*arguments, "--no-evaluate", "--output", "quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert split_stages(err)[1] == "" and json.loads(out)["verdict"] is None
    for folder in ("out", "quiet"):
        assert "Nothing was measured" in (tmp_path / folder / "README.md").read_text()
        assert not (tmp_path / folder / "evidence" / "gate.json").exists()


def test_a_failed_gate_exits_with_1_after_writing_everything(
    capsys, compress_arguments, llama_folder, tmp_path, monkeypatch
):
    measure = mka.pipeline.evaluate.measure_checkpoint

    def measure_worse(checkpoint, *args, **options):
        report = measure(checkpoint, *args, **options)
        worse = [replace(s, items=tuple((2 * nll, n) for nll, n in s.items)) for s in report.scores]
        return replace(report, scores=tuple(worse)) if checkpoint.layers < LAYERS else report

    monkeypatch.setattr(mka.pipeline.evaluate, "measure_checkpoint", measure_worse)
    output = tmp_path / "out"
    arguments = [str(a) for a in (*compress_arguments, "--output", output)]
    assert main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    err = split_stages(err)[1]
    assert json.loads(out)["verdict"] == "fail"
    assert err.startswith("mka: the gate failed this candidate (perplexity words") and err.count("\n") == 1
    assert "Gate: **fail**" in (output / "README.md").read_text()
    evidence = output / "evidence"
    report = ["report", "--plan", evidence / "plan.json", "--base", evidence / "base.json"]
    report += ["--candidate", evidence / "candidate.json", "--output", tmp_path / "report"]
    assert main([str(a) for a in report]) == 1
    assert (tmp_path / "report" / "report.html").is_file()


def test_what_is_typed_wins_over_the_recipe(mka_, compress_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: from-recipe\nmodel: {hub: some/model, revision: main}\ntarget: {layer_ratio: 0.5, protect_first: 1}\n"
        "method: {name: shortgpt}\ngate: {perplexity_recovery: 0.25}\nseed: 7\n"
    )
    unnamed = [argument for argument in compress_arguments if argument not in ("--method", "mka")]
    mka_(*unnamed, "--recipe", recipe, "--output", "out")
    used = load_recipe(tmp_path / "out" / "evidence" / "recipe.yaml")
    assert used.name == "from-recipe" and used.seed == 7 and used.gate.perplexity_recovery == 0.25
    assert used.model.hub is None and used.model.revision is None and used.model.folder is not None
    assert (used.target.layers, used.target.layer_ratio, used.target.protect_first) == (4, None, 1)
    assert MergePlan.load(tmp_path / "out" / "evidence" / "plan.json").method == "shortgpt"
    mka_("compress", "--recipe", tmp_path / "out" / "evidence" / "recipe.yaml", "--output", "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_evaluate_prints_perplexity_with_its_error_and_n(mka_, llama_folder, tables):
    model, tokenizer = load_model(llama_folder, "float32")
    texts = make_texts(SAMPLES, seed=1)
    expected = measure_perplexity(model, tokenizer, texts, name="words", context=32, progress=False)
    arguments = ["evaluate", llama_folder, "--text", tables / "heldout.jsonl", "--context", 32]
    line = next(line for line in mka_(*arguments).splitlines() if line.startswith("perplexity"))
    assert f"n = {expected.n} windows" in line and f"{expected.value:.2f} ± {expected.stderr:.2f}" in line
    score = json.loads(mka_(*arguments, "--json"))["scores"][0]
    assert (score["value"], score["n"]) == (pytest.approx(expected.value), expected.n)


def test_plan_refuses_scores_that_do_not_belong(capsys, mka_, llama_folder, tables, tmp_path):
    states, scores = tmp_path / "states.safetensors", tmp_path / "scores.json"
    mka_("observe", llama_folder, "--calibration", tables / "calibration.jsonl", "--samples", 60, "--output", states)
    said = mka_(
        "score", llama_folder, "--method", "mka", "--states", states, "--set", "coordinates=1", "--output", scores
    )
    assert "depends on the texts was not measured: that takes 100 texts" in said  # there are 60
    plan = ["plan", llama_folder, "--scores", scores, "--layers", 4, "--output", tmp_path / "plan.json"]
    for extra, expected in (
        (["--set", "coordinates=2"], "'coordinates' decides the scores"),
        (["--method", "shortgpt"], "scored by 'mka', not by 'shortgpt'"),
        (["--set", "weights=line-search"], "needs a calibration set"),
        (["--set", "wieghts=fixed"], "did you mean 'weights'?"),
    ):
        assert main([str(a) for a in (*plan, *extra)]) == 2
        assert expected in capsys.readouterr().err
    mka_(*plan, "--set", "weights=fixed", "--set", "weight=0.25")
    made = MergePlan.load(tmp_path / "plan.json")
    assert made.settings["coordinates"] == 1
    assert {step.weight for step in made.steps} == {0.25}


def test_methods_without_scores_plan_at_once(mka_, llama_folder, tmp_path):
    mka_("plan", llama_folder, "--method", "reference_code", "--layers", 4, "--output", tmp_path / "plan.json")
    assert MergePlan.load(tmp_path / "plan.json").removed == (4, 5)


def test_scores_of_enough_texts_say_how_far_they_hang_on_them(mka_, llama_folder, tmp_path):
    table, states, scores = tmp_path / "texts.jsonl", tmp_path / "states.safetensors", tmp_path / "scores.json"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(100)))
    mka_("observe", llama_folder, "--calibration", table, "--samples", 100, "--output", states)
    found = json.loads(
        mka_("score", llama_folder, "--method", "mka", "--states", states, "--output", scores, "--json")
    )["stability"]
    assert (found["texts"], found["halves"]) == (100, 8) and 0 <= found["best_two"] <= 8
    scores.unlink()
    told = f"over 8 half-samples of 100 texts the best pair stays the best in {found['best']}, "
    assert told in mka_("score", llama_folder, "--method", "mka", "--states", states, "--output", scores)


def test_a_plan_with_folds_is_two_files_that_stay_together(
    capsys, mka_, compress_arguments, llama_folder, tables, tmp_path
):
    states, scores, plan = (tmp_path / name for name in ("states.safetensors", "scores.json", "p4.json"))
    calibration = ["--calibration", tables / "calibration.jsonl", "--samples", SAMPLES]
    method = ["--method", "replaceme"]
    mka_("observe", llama_folder, *calibration, "--output", states)
    mka_("score", llama_folder, *method, "--states", states, "--output", scores)
    planning = ["plan", llama_folder, "--scores", scores, "--layers", 4, "--output", plan]
    assert main([str(a) for a in planning]) == 2
    assert "'replaceme' is fitted on calibration texts" in capsys.readouterr().err and not plan.exists()
    mka_(*planning, *calibration)
    assert file_sha256(tmp_path / "p4.folds.safetensors") == MergePlan.load(plan).folds
    mka_("merge", llama_folder, "--plan", plan, "--output", tmp_path / "merged")

    whole = [*compress_arguments, *method, "--output", tmp_path / "whole"]
    foreseen = json.loads(mka_(*whole, "--dry-run", "--json"))["files"]
    mka_(*whole)
    assert all(Path(file).is_file() for file in foreseen)
    assert str(tmp_path / "whole" / "evidence" / "plan.folds.safetensors") in foreseen
    again = ["merge", llama_folder, "--plan", tmp_path / "whole" / "evidence" / "plan.json"]
    mka_(*again, "--output", tmp_path / "again")
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "whole", "again")]
    assert all(torch.equal(models[0][name], other[name]) for other in models[1:] for name in models[0])

    (tmp_path / "p4.folds.safetensors").unlink()
    assert main([str(a) for a in ("merge", llama_folder, "--plan", plan, "--output", tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert "needs its folds in" in err and err.count("\n") == 1 and not (tmp_path / "no").exists()


def test_option_values_are_read_as_what_they_look_like():
    context, option = click.Context(cli), click.Option(["--x"])
    assert read_tasks(context, option, ["hellaswag=40,piqa", "arc_easy=all"]) == {
        "hellaswag": 40,
        "piqa": None,
        "arc_easy": None,
    }
    given = read_settings(context, option, ["a=1", "b=0.5", "c=[0, 1]", "d=one-shot", "e=null", "f=x=y"])
    assert given == {"a": 1, "b": 0.5, "c": [0, 1], "d": "one-shot", "e": None, "f": "x=y"}
