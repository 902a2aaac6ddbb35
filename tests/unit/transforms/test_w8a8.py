"""w8a8: a stock loader gets rows on a grid of their own, and rounds what enters every linear layer token by token."""

import json

import pytest
import torch
from support.models import make_tiny_model, save_model
from transformers import AutoModelForCausalLM

from mka.model.checkpoint import open_checkpoint
from mka.model.verification import inspect_checkpoint, require_sound
from mka.recipe import QuantizeSettings
from mka.transforms import get_quantizer
from mka.transforms.rtn import quantize_checkpoint

LAYERS = 2
IDS = (torch.arange(1, 13) * 31 % 97).reshape(1, 12)
W8A8 = QuantizeSettings(scheme="w8a8")
KINDS = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]}}


def tiny(family="llama", **options):
    return make_tiny_model(family, num_hidden_layers=LAYERS, **KINDS.get(family, {}), **options)


def load_stock(folder):
    """What a stranger gets; the first forward pass unpacks the weights."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        model.eval()(IDS, use_cache=False)
    return model


def linear_layers(model):
    found = model.model.layers.named_modules()
    return {name: module for name, module in found if isinstance(module, torch.nn.Linear)}


def step_of(values):
    """Steps of a grid of 255 that reaches from minus the largest value of a row to it, (R, 1)."""
    return values.double().abs().amax(-1, keepdim=True) / 127.5


@pytest.fixture(scope="module", params=["llama", "qwen2", "phi3", "gemma3_text"])
def written(request, tmp_path_factory):
    root, model = tmp_path_factory.mktemp(request.param), tiny(request.param)
    base = open_checkpoint(save_model(model, root / "base"))
    ticks = []
    quantize_checkpoint(base, root / "out", W8A8, on_tensor=ticks.append)
    return model, base, root / "out", ticks


def test_rows_sit_on_the_nearest_multiple_of_their_own_step(written):
    model, _, folder, _ = written
    before, after = linear_layers(model), linear_layers(load_stock(folder))
    assert before.keys() == after.keys() and len(before) in (4 * LAYERS, 7 * LAYERS)
    for name, module in before.items():
        original, rounded, step = module.weight.double(), after[name].weight.double(), step_of(module.weight)
        levels = rounded / step
        assert (levels - levels.round()).abs().max() < 1e-4
        assert levels.round().min() >= -128 and levels.round().max() <= 127
        # The ends are half a step outside the whole numbers: clamping there costs no more than rounding does.
        assert ((rounded - original).abs() / step).max() <= 0.5 + 1e-4
    state, moved = model.state_dict(), load_stock(folder).state_dict()
    rest = [name for name in state if not name.endswith("proj.weight")]
    assert "lm_head.weight" in rest and all(torch.equal(state[name], moved[name]) for name in rest)


def test_a_product_is_off_by_no_more_than_half_a_step_of_each_of_its_factors(written):
    """|Σ ŵx̂ - Σ wx| <= Σ |x| s_w / 2 + Σ (|w| + s_w / 2) s_x / 2, and inputs are rounded at all."""
    model, _, folder, _ = written
    before, after = linear_layers(model), linear_layers(load_stock(folder))
    generator = torch.Generator().manual_seed(0)
    for name, module in before.items():
        # Tokens of very different size: one scale for all of them would leave nothing of the first.
        inputs = torch.randn(1, 5, module.in_features, generator=generator)
        inputs *= torch.tensor([1e-3, 1, 10, 1e3, 1]).reshape(1, 5, 1)
        weight, of_rows, of_tokens = module.weight.double(), step_of(module.weight), step_of(inputs)
        with torch.no_grad():
            found, exact = after[name](inputs).double(), module(inputs).double()
            weights_alone = torch.nn.functional.linear(inputs, after[name].weight, module.bias).double()
        by_weights = inputs.double().abs().sum(-1, keepdim=True) * of_rows.T / 2
        by_inputs = of_tokens / 2 * (weight.abs() + of_rows / 2).sum(-1)
        slack = 1e-4 * (by_weights + by_inputs) + 1e-6 * exact.abs()
        assert bool(((found - exact).abs() <= by_weights + by_inputs + slack).all()), name
        assert float((found - weights_alone).abs().max()) > 0, name


def test_logits_are_as_close_as_rounding_lets_them_be(written):
    """Within 5 %: an operand's error is s / √12 with s = peak / 127.5.

    With a peak of four root mean squares, which rows of 32 to 64 random numbers hardly pass, that is 0.9 % of it, 1.3 %
    of a product of two, and √14 times as much after the 14 products of two layers, as their errors are independent and
    each adds its own to the residual stream.
    """
    model, _, folder, _ = written
    with torch.no_grad():
        base, found = model(IDS).logits, load_stock(folder)(IDS).logits
    assert 0 < float((found - base).norm() / base.norm()) < 0.05


def test_the_folder_is_sound_as_large_as_foreseen_and_says_how_it_is_stored(written):
    model, base, folder, ticks = written
    facts = inspect_checkpoint(folder)
    require_sound(facts, folder)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    packed = open_checkpoint(folder)
    assert sum(ticks) == get_quantizer(W8A8).foresee(base, W8A8) == packed.nbytes
    # A byte per weight and a float32 per row in the place of four bytes per weight.
    shapes = [module.weight.shape for module in linear_layers(model).values()]
    assert packed.nbytes == base.nbytes - sum(3 * rows * columns - 4 * rows for rows, columns in shapes)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["format"] == group["format"] == "int-quantized" and config["ignore"] == ["lm_head"]
    assert (group["weights"]["strategy"], group["weights"]["num_bits"]) == ("channel", 8)
    inputs = group["input_activations"]
    assert (inputs["strategy"], inputs["num_bits"], inputs["dynamic"], inputs["symmetric"]) == ("token", 8, True, True)


def test_the_group_size_decides_nothing(tmp_path):
    base = open_checkpoint(save_model(tiny(), tmp_path / "base"))
    for size in (16, 4096):
        quantize_checkpoint(base, tmp_path / str(size), QuantizeSettings(scheme="w8a8", group_size=size))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("16", "4096"))
    assert first == second


def test_bfloat16_loads_as_such(tmp_path):
    base = open_checkpoint(save_model(tiny(dtype=torch.bfloat16), tmp_path / "base"))
    facts = quantize_checkpoint(base, tmp_path / "out", W8A8, verify=inspect_checkpoint)
    require_sound(facts, "out")
    assert {layer.weight.dtype for layer in linear_layers(load_stock(tmp_path / "out")).values()} == {torch.bfloat16}
