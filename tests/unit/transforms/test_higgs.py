"""HIGGS: grids against what is known of them, errors against the grids', and a folder that stock loading reads."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from scipy.spatial import cKDTree
from scipy.stats import norm
from support.models import FAMILY_NAMES, make_tiny_model, save_model

from mka.errors import CheckpointError, RecipeError
from mka.model.checkpoint import open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.recipe import QuantizeSettings, TransformChoice
from mka.transforms import resolve_transforms
from mka.transforms.grids import fit_pairs, fit_scalars
from mka.transforms.higgs import Settings, round_turned, simulate_higgs
from mka.transforms.packing import find_linear
from mka.transforms.rtn import quantize_checkpoint

# Least mean squared errors of a standard normal number in 1 to 4 bits: Max, 1960, table I.
LEAST = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def distort(points, numbers):
    """Mean squared error per number, found by a tree."""
    return float((cKDTree(points).query(numbers)[0] ** 2).mean() / numbers.shape[1])


@pytest.mark.parametrize("bits", LEAST)
def test_grids_of_numbers_lose_what_is_known_to_be_the_least(bits):
    points = fit_scalars(bits)
    assert len(points) == 2**bits and np.allclose(points, -points[::-1], atol=1e-6)
    edges = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
    # Each point is the mean of its cell, so that E(x - q)^2 = 1 - E q^2.
    lost = 1 - float(np.diff(norm.cdf(edges)) @ points**2)
    assert lost == pytest.approx(LEAST[bits], rel=1e-3)


def test_one_bit_is_known_exactly():
    assert np.allclose(fit_scalars(1), [-np.sqrt(2 / np.pi), np.sqrt(2 / np.pi)])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grids_of_pairs_lose_less_and_no_less_than_rate_and_distortion_allow(bits):
    points = fit_pairs(bits)
    assert points.shape == (4**bits, 2)
    lost = distort(points, np.random.default_rng(7).standard_normal((200_000, 2)))
    # No code does better than 4^-bits; a plane's best cells, hexagons, lose 0.9623 of what squares do at high rates.
    assert 4.0**-bits < lost < 0.97 * LEAST[bits]


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_of_weights_that_are_not_normal_the_error_is_the_grids_all_the_same(bits, pairs):
    settings = Settings(bits=bits, group_size=128, pairs=pairs)
    rng = np.random.default_rng(3)
    pointed = torch.tensor(rng.laplace(size=(64, 1024)), dtype=torch.float32)
    points = fit_pairs(bits) if pairs else fit_scalars(bits)[:, None]
    known = distort(points, rng.standard_normal((100_000, points.shape[1])))
    lost = (round_turned(pointed, settings, "w") - pointed).square().sum() / pointed.square().sum()
    assert float(lost) == pytest.approx(known, rel=0.06)


def test_a_group_of_zeros_stays_and_signs_hang_on_seed_and_name():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    settings = Settings(bits=2, group_size=32)
    one = round_turned(weight, settings, "a")
    assert torch.equal(one[1], torch.zeros(64)) and torch.equal(one, round_turned(weight, settings, "a"))
    assert not torch.equal(one, round_turned(weight, settings, "b"))
    assert not torch.equal(one, round_turned(weight, Settings(bits=2, group_size=32, seed=1), "a"))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_folder_is_stock_and_only_linear_layers_have_moved(family, tmp_path):
    source = open_checkpoint(save_model(make_tiny_model(family), tmp_path / "base"))
    simulate_higgs(source, Settings(bits=3, group_size=16), tmp_path / "out", verify=verify_checkpoint)
    made = open_checkpoint(tmp_path / "out")
    assert made.nbytes == source.nbytes
    linear = {info.name for info in find_linear(source)}
    before, after = (load_file(folder / "model.safetensors") for folder in (source.path, made.path))
    assert {name for name in before if not torch.equal(before[name], after[name])} == linear


def test_rows_of_a_matrix_are_rounded_alike_however_many_at_a_time():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    settings = Settings(bits=4, group_size=16)
    parts = torch.cat([round_turned(rows, settings, "a") for rows in weight.split(7)])
    assert torch.allclose(parts, round_turned(weight, settings, "a"), atol=1e-6)


def test_refusals(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    with pytest.raises(RecipeError, match=r"group_size 256 does not divide the layer widths \[32, 64\].*: 8, 16, 32"):
        simulate_higgs(source, Settings(), tmp_path / "out")
    with pytest.raises(ValidationError, match="a Hadamard matrix has a power of two"):
        Settings(group_size=48)
    with pytest.raises(RecipeError, match="bits"):
        resolve_transforms([TransformChoice(name="higgs", settings={"bits": 5})])
    quantize_checkpoint(source, tmp_path / "int8", QuantizeSettings(scheme="int8", group_size=16))
    with pytest.raises(CheckpointError, match="already quantized"):
        simulate_higgs(open_checkpoint(tmp_path / "int8"), Settings(group_size=16), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_said_of_it_calls_it_a_simulation():
    (found,) = resolve_transforms([TransformChoice(name="higgs", settings={"bits": 3})])
    assert found.describe() == "HIGGS, 3 bits in groups of 256, pairs rounded (simulated: stored in floating point)"
