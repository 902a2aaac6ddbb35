"""GGUF files, read by transformers' own loader and by the package gguf: the same model, or refused."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from support.gguf_files import REGULAR, load_by_hand, logits_of, read_fields, read_logits, read_tensors
from support.models import FAMILY_NAMES, make_byte_tokenizer, make_tiny_model, save_model

from mka.cli.main import main
from mka.errors import CheckpointError, NumericsError, OutputError, RecipeError
from mka.export import get_export
from mka.export.architectures import ARCHITECTURES
from mka.export.gguf import write_gguf
from mka.model.checkpoint import open_checkpoint
from mka.store.sums import verify_sums


@pytest.fixture
def make(tmp_path):
    """Make a folder of a tiny model with a byte-level tokenizer; the embedding has rows that no token uses."""

    def make(family="llama", *, tokenizer=None, **overrides):
        model = make_tiny_model(family, **{"vocab_size": 320, **REGULAR.get(family, {}), **overrides})
        return model, save_model(model, tmp_path / f"tiny-{family}", tokenizer=tokenizer or make_byte_tokenizer())

    return make


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_stock_reads_the_same_model_from_the_file(family, make, target):
    model, folder = make(family)
    file = write_gguf(folder, target, "f32")
    if family == "smollm3":  # transformers has no reader of its files
        found = logits_of(load_by_hand(file, model))
    else:
        # Mistral's files are a Llama's. Of others a reader takes the width of heads for the class's default.
        found = read_logits(file, None if family in ("llama", "mistral") else model.config)
    assert (found - logits_of(model)).abs().max() < 1e-4
    config, fields = model.config, read_fields(file)
    name = ARCHITECTURES[family].name
    assert fields["general.architecture"] == name and fields["general.file_type"] == gguf.LlamaFileType.ALL_F32
    said = {
        "block_count": 6,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.dimension_count": 8,
        "vocab_size": 320,
    }
    assert {key: fields[f"{name}.{key}"] for key in said} == said
    assert fields[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    theta = config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
    assert fields[f"{name}.rope.freq_base"] == theta
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert ("output.weight" in read_tensors(file)) == (not config.tie_word_embeddings)


def test_gemmas_windows_caps_and_second_rotary_are_said(make, target):
    fields = read_fields(write_gguf(make("gemma3_text")[1], target, "f32"))
    said = {"attention.sliding_window": 16, "attention.sliding_window_pattern": 3, "rope.freq_base_swa": 10000}
    assert {key: fields[f"gemma3.{key}"] for key in said} == said
    fields = read_fields(write_gguf(make("gemma2")[1], target, "f32"))
    said = {"attention.sliding_window_pattern": 2, "attn_logit_softcapping": 50, "final_logit_softcapping": 30}
    assert {key: fields[f"gemma2.{key}"] for key in said} == said


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_and_tied_heads_are_kept(family, make, target):
    model, folder = make(family, tie_word_embeddings=True, **({"attention_bias": True} if family == "llama" else {}))
    file = write_gguf(folder, target, "f32")
    assert "output.weight" not in read_tensors(file) and "blk.5.attn_q.bias" in read_tensors(file)
    assert (read_logits(file, model.config) - logits_of(model)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "group", "share"), [("f16", 1, 2**-11), ("bf16", 1, 2**-8), ("q8_0", 32, 1 / 254), ("q4_0", 32, 1 / 8)]
)
def test_rounded_weights_are_as_near_as_their_type_can_be(name, group, share, make, target):
    """Half a step of float, half of 127 steps either way, or a whole one of 8, of which the far side has 7."""
    model, folder = make("llama", hidden_size=64, head_dim=16)
    exact = read_tensors(write_gguf(folder, target, "f32"))
    file = write_gguf(folder, target, name)
    found = read_tensors(file)
    assert found.keys() == exact.keys() and file.name == f"tiny-llama-{name.upper()}.gguf"
    for tensor, rows in exact.items():
        if rows.ndim < 2:  # vectors are not rounded
            assert (found[tensor] == rows).all()
            continue
        steps = 254 if name == "q4_0" and tensor == "output.weight" else None
        most = np.abs(rows).reshape(-1, group).max(axis=1) * (1 / steps if steps else share)
        errors = np.abs(found[tensor] - rows).reshape(-1, group).max(axis=1)
        # A scale is a float16 itself.
        assert (errors <= most * 1.1 + 1e-7).all() and errors.max() > 0
    if name != "q4_0":
        assert (read_logits(file) - logits_of(model)).abs().max() < 0.05 * logits_of(model).abs().max()


def test_a_width_that_groups_do_not_fill_gets_float16(make, target):
    folder = make("llama", intermediate_size=48)[1]
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(write_gguf(folder, target, "q4_0")).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")
    assert (kinds["token_embd.weight"], kinds["output.weight"], kinds["output_norm.weight"]) == ("Q4_0", "Q8_0", "F32")


def test_a_shard_at_a_time_makes_the_same_file(make, tmp_path, target):
    model, folder = make()
    parts = save_model(model, tmp_path / "parts" / "tiny-llama", max_shard_size="40KB", tokenizer=make_byte_tokenizer())
    (tmp_path / "other").mkdir()
    whole, pieces = write_gguf(folder, target, "q8_0"), write_gguf(parts, tmp_path / "other", "q8_0")
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert all((read_tensors(pieces)[name] == rows).all() for name, rows in read_tensors(whole).items())


def test_rotary_scaling_is_said_as_llama_cpp_reads_it(make, target):
    length = {"original_max_position_embeddings": 64}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **length}
    file = write_gguf(make(rope_parameters={"rope_theta": 10000.0, **llama3})[1], target, "f32")
    # Frequencies 1, 0.1, 0.01, 0.001: wavelengths 6.3 (below 64 / 4: kept), 63 (between), 628 and 6283 (all of 8).
    between = (64 / (2 * np.pi / 0.1) - 1) / (4 - 1)
    factors = [1, 1 / ((1 - between) / 8 + between), 8, 8]
    assert read_tensors(file)["rope_freqs.weight"] == pytest.approx(factors, rel=1e-5)
    yarn = {"rope_type": "yarn", "factor": 4.0, **length}
    fields = read_fields(write_gguf(make("qwen2", rope_parameters={"rope_theta": 5e5, **yarn})[1], target, "f32"))
    said = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    assert {key: fields[f"qwen2.rope.scaling.{key}"] for key in said} == said and fields["qwen2.rope.freq_base"] == 5e5
    long = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        **length,
    }
    folder = make("phi3", rope_parameters={"rope_theta": 1e4, **long}, **length)[1]
    file = write_gguf(folder, target, "f32")
    tensors, fields = read_tensors(file), read_fields(file)
    assert tensors["rope_factors_long.weight"].tolist() == [2, 3, 4, 5]
    assert tensors["rope_factors_short.weight"] == pytest.approx([1, 1.1, 1.2, 1.3])
    # Sqrt(1 + ln(128 / 64) / ln(64)), as Phi-3's authors have it.
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(2) / np.log(64)) ** 0.5)


@pytest.mark.parametrize(("family", "tensor"), [("gemma2", "attn_q"), ("gemma3_text", "attn_q_norm")])
def test_a_scale_of_attention_that_files_cannot_say_goes_into_the_queries(family, tensor, make, target, tmp_path):
    """Readers take 1/sqrt(8) for six layers; 1/sqrt(2) is twice that."""
    plain = read_tensors(write_gguf(make(family)[1], target, "f32"))
    shutil.rmtree(tmp_path / f"tiny-{family}")
    scaled = read_tensors(write_gguf(make(family, query_pre_attn_scalar=2)[1], target, "f32"))
    for name, rows in plain.items():
        assert (scaled[name] == rows * (2 if name.split(".")[-2] == tensor else 1)).all()


def test_where_there_are_no_windows_the_context_ends_within_one(make, target):
    fields = read_fields(write_gguf(make("mistral", sliding_window=24)[1], target, "f32"))
    assert fields["llama.context_length"] == 24


def test_the_command_publishes_file_modelfile_licence_and_sums(make, tmp_path, capsys):
    folder = make()[1]
    sampling = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "eos_token_id": [2, 7]}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    (folder / "LICENSE").write_text("terms")
    output = tmp_path / "published"
    assert main(["export", str(folder), "--format", "gguf", "--output", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "q8_0"
    assert {f.name for f in output.iterdir()} == {"tiny-llama-Q8_0.gguf", "Modelfile", "LICENSE", "SHA256SUMS"}
    lines = (output / "Modelfile").read_text().splitlines()
    assert lines[:3] == ["FROM ./tiny-llama-Q8_0.gguf", "PARAMETER temperature 0.6", "PARAMETER repeat_penalty 1.1"]
    assert lines[3] == 'PARAMETER stop "</s>"' and verify_sums(output)
    fields = read_fields(output / "tiny-llama-Q8_0.gguf")
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and fields["tokenizer.ggml.eot_token_id"] == 7


def test_a_file_that_does_not_hold_what_was_written_is_not_kept(make, target, monkeypatch):
    from mka.export import gguf as module

    folder, round_rows = make()[1], module.round_rows

    def shift(rows, kind, name):
        return round_rows(
            np.roll(rows, 1, axis=0) if name.endswith("layers.3.mlp.up_proj.weight") else rows, kind, name
        )

    monkeypatch.setattr(module, "round_rows", shift)
    for name in ("f32", "q8_0", "q4_0"):
        with pytest.raises(OutputError, match=r"blk\.3\.ffn_up\.weight reads back"):
            write_gguf(folder, target, name)
    assert list(target.iterdir()) == []


def test_a_disk_without_room_is_refused_before_a_weight_is_read(make, target, monkeypatch):
    folder = make()[1]
    needed = get_export("gguf", "f32").foresee(open_checkpoint(folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(needed, 1, needed - 1))
    monkeypatch.setattr("mka.export.gguf._write", None)
    with pytest.raises(OutputError, match="disk full"):
        write_gguf(folder, target, "f32")
    monkeypatch.undo()
    assert 0.7 * needed < write_gguf(folder, target, "f32").stat().st_size <= needed


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1, 1]}, r"no_rope_layers \[1, 1, 0, 1, 1, 1\]"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 2}, "layer_types"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gemma2", {"final_logit_softcapping": None}, "softcapping"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama", {"mlp_bias": True, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ("qwen3", {"attention_bias": True}, "o_proj.bias has no place"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, overrides, message, make, target):
    with pytest.raises(CheckpointError, match=message):
        write_gguf(make(family, **overrides)[1], target, "f32")
    assert list(target.iterdir()) == []


def test_types_models_and_weights_that_cannot_be_are_refused(make, target, monkeypatch):
    model, folder = make()
    with pytest.raises(RecipeError, match="did you mean 'q8_0'"):
        write_gguf(folder, target, "q8")
    monkeypatch.setattr("mka.export.ggml._find_quantizer", lambda: None)
    with pytest.raises(RecipeError, match=r"xllamacpp .* without it: f32, f16, bf16, q8_0, q4_0"):
        write_gguf(folder, target, "q4_k_m")
    monkeypatch.delitem(ARCHITECTURES, "llama")
    with pytest.raises(CheckpointError, match="'llama' is none that GGUF files can hold"):
        write_gguf(folder, target, "f32")
    monkeypatch.undo()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = 1e5
    save_model(model, folder, tokenizer=make_byte_tokenizer())
    with pytest.raises(NumericsError, match=r"layers\.2\.mlp\.up_proj\.weight: .* beyond float16"):
        write_gguf(folder, target, "f16")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rounded already"):
        write_gguf(folder, target, "f32")
    assert list(target.iterdir()) == []
