"""Embedding and head rounded beside the layers: tied or not, as stock loading takes them, or refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_tiny_model, save_model
from transformers import AutoModelForCausalLM

from mka.errors import RecipeError
from mka.model.checkpoint import describe_checkpoint, open_checkpoint
from mka.model.verification import inspect_checkpoint, require_sound
from mka.recipe import QuantizeSettings
from mka.transforms.packing import check_roundable, foresee_packed
from mka.transforms.rtn import quantize_checkpoint

IDS = (torch.arange(1, 13) * 31 % 97).reshape(1, 12)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS, WIDTH = 97, 32


def settings(scheme="int8", embeddings="int8"):
    return QuantizeSettings(scheme=scheme, group_size=16, embeddings=embeddings)


def write(model, root, scheme, embeddings="int8"):
    base = open_checkpoint(save_model(model, root / "base"))
    facts = quantize_checkpoint(base, root / "out", settings(scheme, embeddings), verify=inspect_checkpoint)
    require_sound(facts, root)
    return base, facts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int4", "w8a8"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_stock_loader_unpacks_both_to_half_a_step_of_each_row(family, scheme, tied, tmp_path):
    model = make_tiny_model(family, num_hidden_layers=2, tie_word_embeddings=tied)
    _, facts = write(model, tmp_path, scheme)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["parameters"] == describe_checkpoint(open_checkpoint(tmp_path / "out"))["parameters"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        loaded.eval()(IDS, use_cache=False)
    for before, after in (
        (model.model.embed_tokens.weight, loaded.model.embed_tokens.weight),
        (model.lm_head.weight, loaded.lm_head.weight),
    ):
        step = before.detach().double().abs().amax(-1, keepdim=True) / 127.5
        error = (after - before).detach().double().abs()
        assert after.dtype == before.dtype and float(error.max()) > 0
        assert bool((error <= (0.5 + 1e-4) * step).all())
    # What the embedding's rows give is what stands in them, and nothing but rounding lies between.
    assert torch.equal(loaded.get_input_embeddings()(IDS), loaded.model.embed_tokens.weight[IDS])


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_stored_is_a_byte_per_weight_and_what_was_foreseen(tied, tmp_path):
    model = make_tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=tied)
    base, facts = write(model, tmp_path, "int8")
    assert foresee_packed(base, settings()) == facts["bytes"] == open_checkpoint(tmp_path / "out").nbytes
    # Four bytes become one, and every row has a float32; a tied head has the rows' scales, and no bytes of its own.
    saved = (1 if tied else 2) * 3 * ROWS * WIDTH - 2 * 4 * ROWS
    assert foresee_packed(base, settings(embeddings="off")) - facts["bytes"] == saved
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored[EMBEDDING].dtype == torch.int8 and (HEAD in stored) == (not tied)
    assert ("lm_head.weight_scale" in stored) and stored["lm_head.weight_scale"].shape == (ROWS, 1)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] == tied
    groups = config["quantization_config"]["config_groups"]
    # Whoever takes the first group that fits has to come to the head's own before that of all linear layers.
    assert list(groups) == ["embeddings", "group_0"]
    assert groups["embeddings"]["targets"] == ["model.embed_tokens", "lm_head"]


def test_a_head_stored_though_tied_is_not_stored_again(tmp_path):
    model = make_tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    folder = save_model(model, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    facts = quantize_checkpoint(open_checkpoint(folder), tmp_path / "out", settings(), verify=inspect_checkpoint)
    require_sound(facts, "out")
    assert HEAD not in load_file(tmp_path / "out/model.safetensors")


def test_layers_are_the_same_bytes_with_and_without(tmp_path):
    model = make_tiny_model("llama", num_hidden_layers=2)
    write(model, tmp_path / "with", "int4")
    write(model, tmp_path / "without", "int4", "off")
    both, alone = (load_file(tmp_path / name / "out/model.safetensors") for name in ("with", "without"))
    layers = [name for name in alone if ".layers." in name]
    assert layers and all(torch.equal(both[name], alone[name]) for name in layers)


def test_an_embedding_with_more_than_a_weight_is_refused(tmp_path):
    base = open_checkpoint(save_model(make_tiny_model("gemma3_text"), tmp_path / "base"))
    check_roundable(base, settings(embeddings="off"))
    with pytest.raises(RecipeError) as caught:
        check_roundable(base, settings())
    assert "the embedding of gemma3_text keeps embed_scale beside its weight" in str(caught.value)
    assert str(caught.value).endswith("leave embeddings off") and "\n" not in str(caught.value)
