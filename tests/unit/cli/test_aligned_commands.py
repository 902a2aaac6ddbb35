"""Aligned merging through the command line: what it leaves, foresees and refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_texts, make_tiny_model, save_model

import mka.model.loading
from mka.cli.main import main
from mka.pipeline.recipes import load_recipe
from mka.plan.plan import MergePlan
from mka.store.sums import verify_sums

TRIALS = ["--set", "tokens=256", "--set", "heldout_tokens=64", "--set", "context=16"]


def write_table(path, **sources):
    rows = [json.dumps({"source": name, "text": text}) for name, texts in sources.items() for text in texts]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_table(folder / "calibration.jsonl", words=make_texts(60))
    write_table(folder / "heldout.jsonl", words=make_texts(30, seed=1))
    sources = {"one": make_texts(40, seed=2), "two": make_texts(20, seed=3), "three": make_texts(4, seed=4)}
    write_table(folder / "alignment.jsonl", **sources)
    # 16 is the shortest window; the recipe has no option for it on the command line.
    (folder / "tiny.yaml").write_text(
        "name: tiny\nmethod: {name: mka}\nmodel: {folder: x}\ntarget: {layers: 4}\nalignment: {context: 16}\n"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(make_tiny_model("llama"), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def arguments(folder, tables):
    given = ["compress", folder, "--recipe", tables / "tiny.yaml", "--calibration", tables / "calibration.jsonl"]
    given += ["--samples", 60, "--text", tables / "heldout.jsonl", "--context", 32, "--method", "aligned", *TRIALS]
    return [*given, "--align", "--align-tokens", 512, "--alignment-table", tables / "alignment.jsonl"]


def succeed(capsys, *given):
    capsys.readouterr()
    assert main([str(argument) for argument in given]) in (0, 1)
    return capsys.readouterr().out


def refuse(capsys, *given):
    capsys.readouterr()
    assert main([str(argument) for argument in given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mka: ") and err.count("\n") == 1
    return err


def test_compress_refits_what_it_merges_and_says_on_what(capsys, arguments, tmp_path, tables, folder):
    output = tmp_path / "out"
    foreseen = json.loads(succeed(capsys, *arguments, "--output", output, "--dry-run", "--json"))
    assert not output.exists()
    said = succeed(capsys, *arguments, "--output", output, "--dry-run")
    assert f"on {foreseen['alignment']['tokens']:,} tokens of {len(foreseen['alignment']['windows'])} sources" in said
    # Six arrays of states and one of the features of four layers, 32 bit; three matrices of moments, 64 bit. One window
    # of tokens said twice is walked along for every ten of text.
    tokens, width, inner = round(1.1 * foreseen["alignment"]["tokens"]), 32, 4 * 64
    assert foreseen["alignment"]["memory_bytes"] == tokens * (6 * width + inner) * 4 + 3 * inner**2 * 8
    made = json.loads(succeed(capsys, *arguments, "--output", output, "--json"))
    assert verify_sums(output) and all(Path(file).is_file() for file in foreseen["files"])
    assert str(output / "evidence" / "alignment.json") in foreseen["files"]
    assert made["alignment"]["windows"] == foreseen["alignment"]["windows"]
    assert made["alignment"]["tokens"] == foreseen["alignment"]["tokens"] <= 512

    written = json.loads((output / "evidence" / "alignment.json").read_text())
    assert written["format"] == "mka-alignment/1" and len(written["table_digest"]) == 64
    assert written["probes"]["source"] == "two"  # the second largest of the table
    penalties = written["probes"]["divergence"]
    assert written["penalty"] == min((float(name) for name in penalties), key=lambda p: penalties[str(p)])
    assert len(written["layers"]) == 4

    plan = MergePlan.load(output / "evidence" / "plan.json")
    assert plan.method == "aligned" and plan.layers_out == 4 and all(layer.verb == "take" for layer in plan.merged)
    before, after = (load_file(path / "model.safetensors") for path in (folder, output))
    first = next(i for i, layer in enumerate(plan.layers) if not layer.is_copy)
    name = "mlp.down_proj.weight"
    for position, layer in enumerate(plan.layers):
        same = torch.equal(after[f"model.layers.{position}.{name}"], before[f"model.layers.{layer.leader}.{name}"])
        assert same == (position < first)
    used = load_recipe(output / "evidence" / "recipe.yaml")
    assert used.alignment.enabled and used.alignment.tokens == 512 and used.alignment.rev is None
    page, card = ((output / name).read_text() for name in ("evidence/report.html", "README.md"))
    merged = plan.merged[0]
    assert f"attention of source layer {merged.attention[0]}" in card
    assert "the neurons that matter most of source layers" in card and "weights 0 and 1" not in card
    assert f"| tokens | {made['alignment']['tokens']:,} in windows of 16 |" in card
    assert 'id="alignment"' in page and "What the refit leaves" not in card

    # Quantized, it still tells its fit, which is the same.
    again = json.loads(
        succeed(capsys, *arguments, "--quantize", "int8", "--group-size", 16, "--output", tmp_path / "q", "--json")
    )
    assert again["alignment"]["penalty"] == made["alignment"]["penalty"]
    assert again["alignment"]["layers"] == made["alignment"]["layers"]


def test_stages_one_by_one_plan_and_merge_an_aligned_model(capsys, folder, tables, tmp_path):
    states, scores, plan = (tmp_path / name for name in ("states.safetensors", "scores.json", "plan.json"))
    calibration = ["--calibration", tables / "calibration.jsonl", "--samples", 60]
    succeed(capsys, "observe", folder, *calibration, "--output", states)
    succeed(capsys, "score", folder, "--method", "aligned", "--states", states, "--output", scores)
    planning = ["plan", folder, "--scores", scores, "--layers", 4, *TRIALS]
    assert "needs a calibration set" in refuse(capsys, *planning, "--output", plan)
    said = succeed(capsys, *planning, *calibration, "--output", plan)
    assert "became one (divergence" in said and "attention of source layer" in said

    merging = ["merge", folder, "--plan", plan, "--output", tmp_path / "out"]
    line = refuse(capsys, *merging)
    assert "decided by an alignment; merge this plan with alignment enabled" in line
    assert "go with --align" in refuse(capsys, *merging, "--align-tokens", 2048)
    table = write_table(tmp_path / "long.jsonl", one=make_texts(400, seed=2), two=make_texts(300, seed=3))
    line = refuse(capsys, *merging, "--align", "--align-tokens", 2048, "--alignment-table", table)
    assert "alignment.context is 512; the model has 128 positions" in line
    assert "text table not found" in refuse(capsys, *merging, "--align", "--alignment-table", tmp_path / "no.jsonl")
    assert not (tmp_path / "out").exists()

    wide = save_model(make_tiny_model("llama", max_position_embeddings=512), tmp_path / "wide")
    made = MergePlan.load(plan)
    plan.write_text(made.to_json().replace(made.base["digest"], ""))
    merging = ["merge", wide, "--plan", plan, "--align", "--align-tokens", 2048, "--alignment-table", table]
    facts = json.loads(succeed(capsys, *merging, "--output", tmp_path / "out", "--json"))
    assert facts["layers"] == 4 and facts["alignment"]["tokens"] == 2048
    assert facts["loaded"]["generation_mismatches"] == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--no-align", "--set", "operator=keep"], "--align-tokens and --alignment-table go with --align"),
        (["--alignment-table", "nowhere.jsonl"], "text table not found: nowhere.jsonl"),
        (["--alignment-table", "single.jsonl"], "'auto' leaves one source out, and 'one' is all there is"),
        (["--alignment-table", "short.jsonl"], "1 windows of 16 tokens in the table"),
        (["--alignment-table", "guilty.jsonl"], "alignment table guilty.jsonl: 1 of 41 calibration texts are used by"),
        (["--align-tokens", "12"], "alignment.tokens"),
        (["--method", "replaceme"], "'replaceme'"),
    ],
)
def test_what_cannot_be_aligned_is_refused_before_any_model_is_loaded(
    capsys, arguments, changes, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    one = make_texts(40, seed=2)
    quoted = make_texts(30, seed=1)[3]
    write_table(tmp_path / "single.jsonl", one=one)
    write_table(tmp_path / "short.jsonl", one=[" ".join(["w5"] * 20)])
    write_table(tmp_path / "guilty.jsonl", one=one, two=[quoted.upper().replace("W", "w")])
    monkeypatch.setattr(mka.model.loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(mka.model.loading, "open_decoder", lambda *_: pytest.fail("the model was opened"))
    assert expected in refuse(capsys, *arguments, *changes, "--output", "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_leaves_a_choice_to_the_alignment_is_refused_without_one(capsys, folder, tables, tmp_path):
    given = ["compress", folder, "--method", "aligned", "--layers", 4, "--output", tmp_path / "out"]
    line = refuse(capsys, *given, "--calibration", tables / "calibration.jsonl")
    assert line == "mka: options: method 'aligned' with operator concat-select needs alignment: {enabled: true}\n"


def test_a_deletion_is_aligned_too_and_its_last_kept_layer_answers_for_what_went(capsys, arguments, tmp_path, folder):
    """The tail is deleted: only the layer before it has anything to make up for."""
    at = arguments.index("aligned")
    given = [*arguments[:at], "reference_code", *arguments[at + 1 + len(TRIALS) :]]
    succeed(capsys, *given, "--output", tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    changed = {int(name.split(".")[2]) for name in after if not torch.equal(after[name], before[name])}
    assert changed == {3}
