"""What every supported family must keep: function-preserving folds, lossless merges, stock output."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.candidates import build_candidate
from support.evidence import observe
from support.models import LAYERS, make_texts, make_tiny_model, save_model

from mka.errors import PlanError
from mka.evidence.oracles import Divergence
from mka.model.checkpoint import open_checkpoint
from mka.model.families import get_family
from mka.model.verification import inspect_checkpoint, require_sound
from mka.plan.plan import MergedLayer, MergePlan, identity_layers, keep_layers
from mka.transforms.merge import merge_checkpoint
from mka.transforms.verbs import combine_layers

IDS = (torch.arange(1, 25) * 31 % 97).reshape(2, 12)


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def plan_of(layers, count=LAYERS):
    return MergePlan("test", "test", count, tuple(layers))


def twin_model(family, left, right, **kwargs):
    """Layer ``right`` is a copy of layer ``left``."""
    model = make_tiny_model(family, **kwargs)
    model.model.layers[right].load_state_dict(model.model.layers[left].state_dict())
    return model


def neutral_model(family, layer, **kwargs):
    """Layer ``layer`` adds nothing to the residual stream."""
    model = make_tiny_model(family, **kwargs)
    with torch.no_grad():
        for name, parameter in model.model.layers[layer].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    return model


def test_folding_all_gains_changes_no_logit(family_model):
    """Split every layer into two halves of itself: the sum folds the gains, the function must stay."""
    model = family_model.double()
    family = get_family(model.config.model_type, "test")
    reference = logits(model)
    state = model.state_dict()
    folded = dict(state)
    for index in range(LAYERS):
        both = MergedLayer((0, 1), (0.25, 0.75))
        for name in [n for n in state if n.startswith(f"model.layers.{index}.")]:
            suffix = name.removeprefix(f"model.layers.{index}.")
            folded[name] = combine_layers(
                both, suffix, family, lambda i, s, index=index: state[f"model.layers.{index}.{s}"]
            )
    changed = [n for n in folded if not torch.equal(folded[n], state[n])]
    assert any("norm" in n for n in changed) and any("proj" in n for n in changed)
    copy = type(model)(model.config).double().eval()
    copy.load_state_dict(folded)
    # combine_layers sums in float32
    torch.testing.assert_close(logits(copy), reference, atol=1e-4, rtol=1e-4)
    family_model.float()


def test_identity_plan_leaves_every_tensor_byte_equal(family_model, tmp_path):
    source = open_checkpoint(save_model(family_model, tmp_path / "base"))
    merge_checkpoint(plan_of(identity_layers(LAYERS)), source, tmp_path / "out")
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_merged_folder_is_stock_and_equals_the_model_in_memory(family_model, tmp_path):
    folder = save_model(family_model, tmp_path / "base", max_shard_size="30KB")
    source = open_checkpoint(folder)
    layers = (*identity_layers(1), MergedLayer((1, 2), (0.6, 0.4)), *keep_layers([4, 5]))
    if family_model.config.model_type == "gemma2":
        layers = (*identity_layers(2), MergedLayer((2, 4), (0.6, 0.4)), *keep_layers([5]))
    facts = merge_checkpoint(
        plan_of(layers), source, tmp_path / "out", verify=inspect_checkpoint, max_shard_bytes=40_000
    )
    require_sound(facts, "out")
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    assert facts["layers"] == facts["config_layers"] == len(layers)

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert [layer.self_attn.layer_idx for layer in loaded.model.layers] == list(range(len(layers)))
    torch.testing.assert_close(logits(loaded), logits(build_candidate(family_model, layers)))
    assert not torch.allclose(
        logits(loaded), logits(build_candidate(family_model, keep_layers([0, 1, 4, 5]))), atol=1e-3
    )
    written = json.loads((tmp_path / "out/config.json").read_text())
    kinds = written.get("layer_types")
    assert kinds is None or len(kinds) == len(layers)


def test_merging_twins_equals_dropping_one(family_model):
    family = family_model.config.model_type
    left, right = (2, 4) if family == "gemma2" else (1, 2)
    model = twin_model(family, left, right)
    merged = [MergedLayer((left, right), (0.3, 0.7)) if i == left else MergedLayer((i,), (1.0,)) for i in range(LAYERS)]
    if family == "gemma2":
        merged = [*identity_layers(2), MergedLayer((2, 4), (0.3, 0.7)), *keep_layers([5])]
        dropped = keep_layers([0, 1, 2, 5])
    else:
        del merged[right]
        dropped = keep_layers([i for i in range(LAYERS) if i != right])
    torch.testing.assert_close(
        logits(build_candidate(model, merged)), logits(build_candidate(model, dropped)), atol=1e-4, rtol=1e-4
    )


def test_dropping_a_neutral_layer_is_lossless(family_model, tokenizer):
    model = neutral_model(family_model.config.model_type, 3)
    dropped = keep_layers([0, 1, 2, 4, 5])
    torch.testing.assert_close(logits(build_candidate(model, dropped)), logits(model), atol=1e-5, rtol=1e-5)
    divergence = Divergence(model, tokenizer, make_texts(8), max_tokens=16, tokens=100)
    assert abs(divergence(dropped)) < 1e-6
    assert divergence(keep_layers([0, 1, 3, 4, 5])) > 1e-3


def test_divergence_matches_its_definition_with_and_without_reused_prefix(family_model, tokenizer):
    layers = keep_layers([0, 1, 2, 3, 5])
    divergence = Divergence(family_model, tokenizer, make_texts(4), max_tokens=16, tokens=40)
    total, count = 0.0, 0
    candidate = build_candidate(family_model, layers)
    for ids, mask in zip(divergence.ids, divergence.mask):
        ids = ids[: int(mask.sum())].unsqueeze(0)
        with torch.inference_mode():
            base = torch.log_softmax(family_model(ids).logits[0].double(), -1)
            other = torch.log_softmax(candidate(ids).logits[0].double(), -1)
        total += float((base.exp() * (base - other)).sum())
        count += ids.shape[1]
    assert count == divergence.tokens
    assert divergence(layers) == pytest.approx(total / count, rel=1e-3, abs=1e-6)


def test_observation_is_independent_of_padding_and_batching(family_model, tokenizer):
    texts = make_texts(9, high=20)
    together = observe(family_model, tokenizer, texts, max_tokens=32, batch_size=9)
    alone = observe(family_model, tokenizer, texts, max_tokens=32, batch_size=1)
    assert together.pooled.shape == (LAYERS + 1, 9, 32)
    torch.testing.assert_close(torch.tensor(together.pooled), torch.tensor(alone.pooled), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        torch.tensor(together.block_influence), torch.tensor(alone.block_influence), atol=1e-5, rtol=1e-4
    )


def test_observed_last_layer_is_raw_not_normed(family_model, tokenizer):
    text = make_texts(1)
    states = observe(family_model, tokenizer, text, max_tokens=32)
    ids = torch.tensor([tokenizer(text[0])["input_ids"]])
    with torch.inference_mode():
        hidden = family_model(ids, output_hidden_states=True).hidden_states
        normed = family_model.model.norm(torch.tensor(states.pooled[-1]))
    torch.testing.assert_close(torch.tensor(states.pooled[0, 0]), hidden[0][0, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normed[0], hidden[-1][0, -1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(torch.tensor(states.pooled[-1, 0]), hidden[-1][0, -1], atol=1e-2)


def test_layers_of_different_kinds_are_refused(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("gemma3_text"), tmp_path / "base"))
    layers = (*identity_layers(3), MergedLayer((3, 4), (0.5, 0.5)), *keep_layers([5]))
    with pytest.raises(PlanError, match="different kinds"):
        merge_checkpoint(plan_of(layers), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bfloat16_checkpoints_stay_bfloat16(tmp_path):
    model = make_tiny_model("llama", dtype=torch.bfloat16)
    source = open_checkpoint(save_model(model, tmp_path / "base"))
    layers = (*identity_layers(2), MergedLayer((2, 3), (0.5, 0.5)), *keep_layers([4, 5]))
    require_sound(merge_checkpoint(plan_of(layers), source, tmp_path / "out", verify=inspect_checkpoint), "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    state = model.state_dict()
    down = "mlp.down_proj.weight"
    mean = (state[f"model.layers.2.{down}"].float() + state[f"model.layers.3.{down}"].float()) / 2
    assert torch.equal(after[f"model.layers.2.{down}"], mean.bfloat16())
