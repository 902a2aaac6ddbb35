"""Parameters that files hold in pieces, and layers that have no meaningful sum: experts, before a family has them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.evidence import observe
from support.models import make_texts, make_tiny_model, make_tokenizer, save_model

from mka.errors import CheckpointError, PlanError
from mka.evidence.observe import observe_tokens
from mka.model.checkpoint import open_checkpoint
from mka.model.families import FAMILIES, Family
from mka.model.loading import load_model, open_decoder
from mka.model.parts import ATTENTION, MLP, Part
from mka.model.verification import inspect_checkpoint, require_sound
from mka.plan.plan import MergedLayer, MergePlan, identity_layers, keep_layers
from mka.recipe import QuantizeSettings
from mka.transforms import get_quantizer, merge
from mka.transforms.merge import merge_checkpoint

STACKED = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PARTS = (
    Part(ATTENTION, "self_attn", "input_layernorm", QKV, "self_attn.o_proj"),
    Part("experts", "mlp", "post_attention_layernorm", ("mlp.gate",), "mlp", stacked=STACKED),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen3_moe", Family("qwen3_moe", PARTS))
    model = make_tiny_model("qwen3_moe", **MIXTURE)
    return save_model(model, tmp_path / "base")


def test_a_decoder_puts_pieces_together_as_a_stock_loader_does(folder):
    model, _ = load_model(folder, "float32")
    with open_decoder(open_checkpoint(folder), "float32") as (decoder, _):
        for index, layer in enumerate(decoder.layers):
            with decoder.hold(index):
                wanted = dict(model.model.layers[index].named_parameters())
                found = dict(layer.named_parameters())
                assert found.keys() == wanted.keys() and set(STACKED) < found.keys()
                assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        found = observe(decoder, make_tokenizer(), make_texts(5), max_tokens=20)
    wanted = observe(model, make_tokenizer(), make_texts(5), max_tokens=20)
    torch.testing.assert_close(found.pooled, wanted.pooled)


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("3.down_proj", None, "1 missing keys, e.g. model.layers.2.mlp.experts.3.down_proj.weight"),
        ("4.down_proj", (32, 16), "1 unexpected keys, e.g. model.layers.2.mlp.experts.4.down_proj.weight"),
        ("1.up_proj", (15, 32), "1 mismatched keys, e.g. model.layers.2.mlp.experts.gate_up_proj"),
        ("1.up_proj", (32, 16), "1 mismatched keys, e.g. model.layers.2.mlp.experts.gate_up_proj"),
    ],
)
def test_pieces_that_do_not_make_the_parameter_are_refused(folder, name, shape, words):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.2.mlp.experts.{name}.weight"] = torch.zeros(shape or ())
    if shape is None:
        del tensors[f"model.layers.2.mlp.experts.{name}.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words), open_decoder(open_checkpoint(folder), "float32"):
        pytest.fail("opened")


def test_layers_with_experts_are_copied_but_not_summed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "TREATS", merge.TREATS | {"experts"})
    source = open_checkpoint(folder)
    merge_checkpoint(MergePlan("", "", 6, keep_layers([0, 1, 4, 5])), source, tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    piece = "mlp.experts.3.up_proj.weight"
    assert torch.equal(after[f"model.layers.2.{piece}"], before[f"model.layers.4.{piece}"])
    layers = (*identity_layers(4), MergedLayer((4, 5), (0.5, 0.5)))
    words = "qwen3_moe: a weighted sum of layers cannot treat experts; allowed: attention, mlp"
    with pytest.raises(PlanError, match=words):
        merge_checkpoint(MergePlan("", "", 6, layers), source, tmp_path / "sum")
    with open_decoder(source, "float32") as (decoder, _), pytest.raises(PlanError, match=words):
        observe_tokens(decoder, [[5, 6, 7]], layers=layers)


def test_layers_with_experts_are_not_rounded(folder):
    settings = QuantizeSettings(scheme="int8", group_size=16)
    with pytest.raises(PlanError, match=r"quantize\.scheme int8 cannot treat experts; allowed: attention, mlp"):
        get_quantizer(settings).check(open_checkpoint(folder), settings)


def test_layers_of_several_kinds_have_the_parts_whose_tensors_they_have(tmp_path, monkeypatch):
    dense = Part(MLP, "mlp", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
    monkeypatch.setitem(FAMILIES, "qwen3_moe", Family("qwen3_moe", (*PARTS, dense)))
    monkeypatch.setattr(merge, "TREATS", merge.TREATS | {"experts"})
    model = make_tiny_model("qwen3_moe", **MIXTURE, mlp_only_layers=[0, 1])
    source = open_checkpoint(save_model(model, tmp_path / "base"))
    assert source.family.folds["post_attention_layernorm"] == ("mlp.gate", "mlp.gate_proj", "mlp.up_proj")
    with open_decoder(source, "float32") as (decoder, _):
        found = observe(decoder, make_tokenizer(), make_texts(3), max_tokens=20)
    wanted = observe(load_model(source.path, "float32")[0], make_tokenizer(), make_texts(3), max_tokens=20)
    torch.testing.assert_close(found.pooled, wanted.pooled)
    plan = MergePlan("", "", 6, keep_layers([0, 1, 4, 5]))
    require_sound(merge_checkpoint(plan, source, tmp_path / "out", verify=inspect_checkpoint), "out")
