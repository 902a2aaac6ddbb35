"""What noise on a linear layer costs: held against models that were really changed."""

import copy

import pytest
import torch
from support.alignments import diverge, draw_windows, make_sharp_model
from support.models import FAMILY_NAMES, make_tiny_model, save_model

from mka.alignment import sensitivity
from mka.alignment.sensitivity import measure_sensitivity
from mka.model.checkpoint import open_checkpoint
from mka.model.loading import open_decoder

WINDOWS = draw_windows(4)


def add_noise(model, units, size, seed):
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, names in units:
            for name in names:
                weight = changed.model.layers[index].get_submodule(name).weight
                spread = (size * weight.square().mean()).sqrt()
                weight.add_(spread * torch.randn(weight.shape, generator=generator))
    return changed


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_is_the_divergence_of_the_changed_model(family):
    """Noise of the same seed, drawn in the same order, in a model that transformers runs as a whole."""
    model = make_sharp_model(family)
    found, generator = measure_sensitivity(model, WINDOWS, seed=5), torch.Generator().manual_seed(5)
    parts = {names for _, names in found}
    assert len(found) == 6 * 4 and len(parts) == 4
    for (index, names), alpha in found.items():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name in names:
                weight = changed.model.layers[index].get_submodule(name).weight
                spread = (sensitivity.NOISE * weight.square().mean()).sqrt()
                weight.add_(spread * torch.randn(weight.shape, generator=generator))
        assert alpha == pytest.approx(diverge(model, changed, WINDOWS) / sensitivity.NOISE, rel=2e-2, abs=1e-4)


def test_small_noise_adds_up_and_grows_with_its_square(monkeypatch):
    """The linearity theorem: what all of it costs together is the sum, each in proportion to its squared size."""
    model = make_sharp_model("llama")
    monkeypatch.setattr(sensitivity, "NOISE", 1e-4)
    mean = {}
    for seed in range(4):
        for unit, alpha in measure_sensitivity(model, WINDOWS, seed=seed).items():
            mean[unit] = mean.get(unit, 0.0) + alpha / 4
    for size in (1e-4, 4e-4):
        together = sum(diverge(model, add_noise(model, mean, size, seed), WINDOWS) for seed in range(10, 18)) / 8
        assert together == pytest.approx(size * sum(mean.values()), rel=0.25)


def test_a_streamed_model_says_the_same(tmp_path):
    model = make_tiny_model("llama")
    checkpoint = open_checkpoint(save_model(model, tmp_path / "base"))
    with open_decoder(checkpoint, "float32") as (decoder, _):
        streamed, ticks = {}, []
        streamed = measure_sensitivity(decoder, WINDOWS, on_layer=ticks.append)
    assert ticks == [1] * 6
    assert streamed == pytest.approx(measure_sensitivity(model, WINDOWS), rel=1e-3, abs=1e-6)
