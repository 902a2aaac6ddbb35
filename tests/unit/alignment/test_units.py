"""Neurons and key-value groups add up and have no order: functions stay equal when units are moved or put together."""

import copy

import pytest
import torch
from support.models import make_tiny_model
from torch.testing import assert_close

from mka.alignment.units import gather_units, unit_rows
from mka.errors import PlanError
from mka.model.decoder import Decoder
from mka.model.families import get_family
from mka.model.parts import count_units, read_features, reader_sections

IDS = (torch.arange(1, 49) * 31 % 97).reshape(2, 24)
HALVES = ("attention", "mlp")
# Split readers, split readers with biases, fused readers; 4 groups of 2 heads.
FAMILIES = ("llama", "qwen2", "phi3")
GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
each_half = pytest.mark.parametrize("half", HALVES)
each_family = pytest.mark.parametrize("family", FAMILIES)


def half_of(model, half):
    return getattr(get_family(model.config.model_type, "test"), half)


def put_units(made, layers, part, picks):
    """Write chosen units of several layers, readers and writer, into a layer that has room for them."""
    units = count_units(layers[0], part)
    for name in part.readers:
        sections = reader_sections(layers[0], part, name)
        sources = [layer.get_submodule(name) for layer in layers]
        target = made.get_submodule(name)
        target.weight.copy_(gather_units([source.weight for source in sources], sections, units, picks))
        if target.bias is not None:
            target.bias.copy_(gather_units([source.bias for source in sources], sections, units, picks))
    writers = [layer.get_submodule(part.writer).weight for layer in layers]
    columns = [weight[:, unit_rows(weight.shape[1], units, pick)] for weight, pick in zip(writers, picks)]
    made.get_submodule(part.writer).weight.copy_(torch.cat(columns, dim=1))


@each_half
@each_family
def test_units_have_no_order(family, half):
    model = make_tiny_model(family, **GROUPS)
    moved = copy.deepcopy(model)
    part = half_of(model, half)
    with torch.inference_mode():
        for layer, made in zip(model.model.layers, moved.model.layers):
            order = torch.arange(count_units(layer, part)).flip(0)
            put_units(made, [layer], part, [order])
            assert not torch.equal(*(x.get_submodule(part.writer).weight for x in (layer, made)))
        assert_close(moved(IDS).logits, model(IDS).logits, rtol=1e-6, atol=2e-6)


@each_half
@each_family
def test_all_units_of_two_layers_side_by_side_give_the_sum_of_both(family, half):
    model = make_tiny_model(family)
    # Twice the heads, groups and neurons.
    wide = make_tiny_model(family, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128, seed=1)
    part, layers, made = half_of(model, half), list(model.model.layers[:2]), wide.model.layers[0]
    states = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        every = torch.arange(count_units(layers[0], part))
        put_units(made, layers, part, [every, every])
        context = Decoder(model).enter(IDS[:1])[1][0]

        def add(layer):
            return layer.get_submodule(part.writer)(read_features(layer, part, states, context))

        assert_close(add(made), add(layers[0]) + add(layers[1]), rtol=1e-6, atol=2e-6)


@each_family
def test_rows_are_taken_section_by_section(family):
    """Rows are numbered by layer, section, unit and row, so that the expected order can be written down."""
    model = make_tiny_model(family)
    layer = model.model.layers[0]
    for half in HALVES:
        part = half_of(model, half)
        units = count_units(layer, part)
        assert units == (2 if half == "attention" else 64)
        for name in part.readers:
            sections = reader_sections(layer, part, name)
            assert sum(sections) == layer.get_submodule(name).out_features
            labels = [
                torch.tensor([[k, s, r // (size // units)] for s, size in enumerate(sections) for r in range(size)])
                for k in range(2)
            ]
            taken = gather_units(labels, sections, units, [torch.tensor([1]), torch.tensor([0])])
            expected = [
                [k, section, unit]
                for section, size in enumerate(sections)
                for k, unit in ((0, 1), (1, 0))
                for _ in range(size // units)
            ]
            assert taken.tolist() == expected


def test_sections_of_a_fused_reader_are_those_of_its_parts():
    layer = make_tiny_model("phi3").model.layers[0]
    family = get_family("phi3", "test")
    assert reader_sections(layer, family.attention, "self_attn.qkv_proj") == [32, 16, 16]  # 4 heads, 2 groups of 8
    assert reader_sections(layer, family.mlp, "mlp.gate_up_proj") == [64, 64]


def test_rows_of_units_by_hand():
    assert unit_rows(12, 4, torch.tensor([2, 0])).tolist() == [6, 7, 8, 0, 1, 2]


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_heads_behind_norms_of_their_own_are_refused_but_neurons_are_not(family):
    model = make_tiny_model(family)
    with pytest.raises(PlanError, match="q/k norms") as caught:
        count_units(model.model.layers[0], half_of(model, "attention"))
    assert "\n" not in str(caught.value)
    assert count_units(model.model.layers[0], half_of(model, "mlp")) == 64
