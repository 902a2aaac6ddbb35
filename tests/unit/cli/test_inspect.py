"""`mka inspect`: facts of config and headers, counted here another way, and what they mean on this machine."""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from support.models import FAMILY_NAMES, LAYERS, make_tiny_model, save_model

import mka.model.tensors
import mka.outside.machine
import mka.sources.fetch
from mka.cli.main import main
from mka.methods import method_names
from mka.outside.machine import find_memory
from mka.pipeline.inspect import join_ranges
from mka.store.sums import write_sums


@pytest.fixture
def run(capsys):
    def inspect(*given, code=0):
        capsys.readouterr()
        assert main(["inspect", *map(str, given)]) == code
        return capsys.readouterr()

    return inspect


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_facts_are_those_of_the_model(run, family, tmp_path):
    model = make_tiny_model(family, dtype=torch.float16)
    folder = save_model(model, tmp_path / "base")
    found = json.loads(run(folder, "--json").out)["model"]
    count = sum(parameter.numel() for parameter in model.parameters())
    expected = {"model_type": family, "layers": LAYERS, "parameters": count, "bytes": 2 * count, "dtype": "F16"}
    expected |= {"bytes_bf16": 2 * count, "vocabulary": 97, "context": 128, "quantized": False}
    assert {key: found[key] for key in expected} == expected
    assert sorted(layer for kind in found["kinds"] for layer in kind["layers"]) == list(range(LAYERS))
    kinds = {"gemma2": 2, "gemma3_text": 2, "smollm3": 2}
    assert len(found["kinds"]) == kinds.get(family, 1)


def test_no_tensor_is_read_and_nothing_is_hashed(run, llama_folder, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a tensor was read")

    folder = save_model(make_tiny_model("llama"), tmp_path / "base")
    write_sums(folder)
    monkeypatch.setattr(mka.model.tensors.TensorReader, "__call__", refuse)
    monkeypatch.setattr(mka.sources.fetch, "verify_sums", refuse)
    assert "layers       6" in run(folder).out


def test_what_can_go_is_told_per_method(run, tmp_path):
    folder = save_model(make_tiny_model("gemma2"), tmp_path / "base")
    found = json.loads(run(folder, "--json").out)["removable"]
    assert found["layers"] == [2, 3, 4] and (found["protect_first"], found["protect_last"]) == (2, 1)
    methods = {entry["name"]: entry for entry in found["methods"]}
    assert list(methods) == method_names()
    # Kinds alternate: no two neighbours can be summed, any can be deleted, aligned groups take up to four.
    assert (methods["mka"]["fewest"], methods["uidl"]["fewest"], methods["aligned"]["fewest"]) == (6, 3, 4)
    assert [methods[name]["alignment"] for name in ("mka", "aligned", "replaceme")] == ["either", "needed", "none"]
    said = run(folder).out
    assert "layers 2-4 of 0-5 could go or be merged" in said and "layer_types sliding_attention: 0, 2, 4" in said
    assert any(line.split()[0] == "nothing" and "mka" in line for line in said.splitlines() if line.strip())


def test_memory_is_what_a_dry_run_says_and_is_held_against_what_is_free(run, llama_folder, monkeypatch, tmp_path):
    found = json.loads(run(llama_folder, "--json").out)["machine"]
    stages = {entry["stage"]: entry["memory_bytes"] for entry in found["stages"]}
    assert list(stages) == ["observe", "align", "heal (distil)", "heal (local)", "evaluate"]
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(llama_folder)]) == 0
    # The recipe's own dry run, as one stage holds most: healing follows logits of the whole model.
    assert found["recipe"]["heal"]["mode"] == "distil" and all(entry["fits"] for entry in found["stages"])
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=1e9, available=stages["heal (local)"] + 1)
    )
    monkeypatch.setattr(mka.outside.machine, "_CGROUP", tmp_path / "none")
    found = json.loads(run(llama_folder, "--json").out)["machine"]
    fits = {entry["stage"]: entry["fits"] for entry in found["stages"]}
    assert fits["heal (local)"] is True and fits["heal (distil)"] is (stages["heal (distil)"] <= stages["heal (local)"])
    assert found["recipe"]["heal"]["mode"] == ("distil" if fits["heal (distil)"] else "local")


def test_a_containers_bound_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64_000, available=48_000))
    monkeypatch.setattr(mka.outside.machine, "_CGROUP", tmp_path)
    assert find_memory() == (64_000, 48_000)
    for name, text in (
        ("memory.max", "10000"),
        ("memory.current", "9000"),
        ("memory.stat", "anon 1\ninactive_file 500"),
    ):
        (tmp_path / name).write_text(f"{text}\n")
    assert find_memory() == (10_000, 1_500)
    (tmp_path / "memory.max").write_text("max\n")
    assert find_memory() == (64_000, 48_000)


def test_engines_are_those_of_the_table_as_far_as_widths_allow(run, llama_folder, tmp_path):
    def ask(folder):
        found = json.loads(run(folder, "--json").out)["engines"]
        return {(entry["engine"], entry["device"]): entry for entry in found}

    engines = ask(llama_folder)
    assert engines["transformers", "any device"]["not"] == {}
    assert "int8" in engines["vLLM", "CPU"]["not"] and "w8a8" in engines["llama.cpp", "any device"]["not"]
    assert "int4" in engines["vLLM", "CPU"]["loads"]
    odd = save_model(make_tiny_model("llama", hidden_size=48, intermediate_size=80, head_dim=12), tmp_path / "odd")
    assert "multiples of 32" in ask(odd)["vLLM", "CPU"]["not"]["int4"]


def test_a_rounded_model_says_so_and_which_engines_load_it(run, llama_folder, tmp_path):
    from mka.model.checkpoint import open_checkpoint
    from mka.pipeline.quantize import write_quantized
    from mka.recipe import QuantizeSettings

    settings = QuantizeSettings(scheme="int4", group_size=32)
    write_quantized(open_checkpoint(llama_folder), settings, tmp_path / "rounded")
    said = run(tmp_path / "rounded")
    found = json.loads(run(tmp_path / "rounded", "--json").out)
    assert found["model"]["quantized"] and found["removable"]["methods"] == [] and found["machine"]["stages"] == []
    assert {tuple(entry["loads"]) for entry in found["engines"]} == {("int4",)}
    assert "rounded already" in said.out and "next:" not in said.out


def test_refusals_are_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert "does not exist" in run(tmp_path / "gone", code=2).err
    assert "give the folder that holds config.json" in run(tmp_path / "file", code=2).err
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_text("")
    assert "architecture 'bert' is not supported" in run(tmp_path, code=2).err


def test_runs_of_layers():
    assert join_ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7" and join_ranges([]) == ""
