"""Rounding column by column: what can be worked out by hand, and bounds that hold whatever the weights are."""

import numpy as np
import pytest
import torch

from mka.errors import NumericsError
from mka.transforms.columns import DAMPING, SHRINKS, fit_scales, round_columns, round_to
from mka.transforms.formats import describe_scheme, scale_groups


def scheme_of(name, group_size=8):
    return describe_scheme(name, group_size)


def draw(rows, columns, seed=0, tokens=200):
    """Weights, and second moments of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def loss(weight, rounded, gram):
    """Squared change of the output of each row, (R,)."""
    error = (weight - rounded).double()
    return ((error @ gram) * error).sum(1)


def damped(gram):
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def test_a_rounded_column_is_made_up_for_by_the_next():
    """Two inputs of energy 1 and product 1/2; rounding .4 to 0 moves the second by .4 x .5 / 1.01, past the tie."""
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    scale = torch.ones(1, 1)
    weight = torch.tensor([[0.4, 0.35]])
    assert round_to(weight, scale, scheme_of("int4")).tolist() == [[0.0, 0.0]]
    assert round_columns(weight, gram, scale, scheme_of("int4")).tolist() == [[0.0, 1.0]]
    # .16 + .1225 + .14 and .16 + .4225 - .26
    assert loss(weight, torch.tensor([[0.0, 0.0]]), gram).item() == pytest.approx(0.4225)
    assert loss(weight, torch.tensor([[0.0, 1.0]]), gram).item() == pytest.approx(0.3225)


def test_the_input_of_most_energy_is_rounded_first():
    """.4 first would push the other over the tie; the other, exact already, pushes nothing."""
    gram = torch.tensor([[1.0, 0.5], [0.5, 4.0]], dtype=torch.float64)
    found = round_columns(torch.tensor([[0.4, 1.0]]), gram, torch.ones(1, 1), scheme_of("int4"))
    assert found.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "w8a8"])
def test_inputs_that_have_nothing_in_common_leave_rounding_to_the_nearest(name):
    weight, _ = draw(5, 32)
    gram = torch.diag(torch.arange(1, 33, dtype=torch.float64))
    scale = scale_groups(weight, scheme_of(name)).float()
    wanted = round_to(weight.unflatten(-1, (scale.shape[1], -1)), scale[..., None], scheme_of(name)).flatten(1)
    assert torch.equal(round_columns(weight, gram, scale, scheme_of(name)), wanted)


@pytest.mark.parametrize("columns", [24, 300])
def test_the_output_changes_no_more_than_the_theory_allows(columns):
    """Unclipped a step is off by half a scale at most, sum_j (s / 2)^2 / U_jj^2 in all, and by s^2 / 12 on average."""
    weight, gram = draw(16, columns, tokens=2 * columns)
    scale = torch.full((16, 1), 0.25)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).numpy()
    inverse = np.linalg.inv(damped(gram).numpy()[np.ix_(order, order)])
    # L L^T of the inverse read backwards is U^T U: its diagonal is that of the Cholesky factor from the other end.
    upper = np.linalg.cholesky(inverse).T
    bound = ((0.25 / 2 / np.diag(upper)) ** 2).sum()
    rounded = round_columns(weight, gram, scale, scheme_of("int8"))
    assert (rounded / 0.25 - (rounded / 0.25).round()).abs().max() == 0
    assert rounded.abs().max() < 127 * 0.25
    lost = loss(weight, rounded, damped(gram))
    assert lost.max() <= bound * (1 + 1e-3) and lost.mean() == pytest.approx(bound / 3, rel=0.2)
    assert loss(weight, round_to(weight, scale, scheme_of("int8")), damped(gram)).mean() > 2 * lost.mean()


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_correlated_inputs_lose_less_than_by_rounding_to_the_nearest(name):
    weight, gram = draw(64, 128)
    scale = scale_groups(weight, scheme_of(name)).float()
    nearest = round_to(weight.unflatten(-1, (16, 8)), scale[..., None], scheme_of(name)).flatten(1)
    found = round_columns(weight, gram, scale, scheme_of(name))
    assert loss(weight, found, gram).sum() < 0.5 * loss(weight, nearest, gram).sum()
    # All of it are numbers the scheme has.
    steps = found.unflatten(-1, (16, 8)) / scale[..., None]
    half = {"int4": 8, "int3": 4, "int2": 2}[name]
    assert (steps - steps.round()).abs().max() < 1e-4 and steps.min() > -half - 1e-3 and steps.max() < half - 1 + 1e-3


def test_scales_are_the_best_of_those_tried():
    weight, gram = draw(6, 16, seed=3)
    weight[:, 3] *= 6.0  # an outlier is clipped where its input has no energy to speak of
    energy = gram.diagonal().clone()
    energy[3] *= 1e-3
    scheme = scheme_of("int3")
    found = fit_scales(weight, energy, scheme, torch.float32)
    largest = scale_groups(weight, scheme).float()
    assert found.shape == (6, 2) and bool((found <= largest).all()) and bool((found[:, 0] < largest[:, 0]).all())
    for row in range(6):
        for group in range(2):
            columns = slice(8 * group, 8 * group + 8)
            w, e = weight[row, columns].double().numpy(), energy[columns].numpy()
            tried = [float(largest[row, group]) * shrink for shrink in SHRINKS]
            lost = [(e * (w - s * np.clip(np.round(w / s), -4, 3)) ** 2).sum() for s in tried]
            assert lost[int(np.argmin([abs(s - float(found[row, group])) for s in tried]))] <= min(lost) * (1 + 1e-5)


def test_weights_that_are_zero_and_inputs_that_never_fire_are_no_fault():
    weight, gram = draw(4, 16)
    weight[1] = 0.0
    gram[:, 5] = gram[5] = 0.0
    scheme = scheme_of("int4")
    scale = fit_scales(weight, gram.diagonal(), scheme, torch.float32)
    found = round_columns(weight, gram, scale, scheme)
    assert bool(found.isfinite().all()) and bool((found[1] == 0).all())
    assert bool(round_columns(weight, torch.zeros_like(gram), scale, scheme).isfinite().all())


def test_scales_are_numbers_of_the_dtype_they_are_stored_in():
    weight, gram = draw(4, 16)
    scale = fit_scales(weight, gram.diagonal(), scheme_of("int4"), torch.bfloat16)
    assert torch.equal(scale.bfloat16().float(), scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_that_are_not_finite_are_refused(value):
    weight, gram = draw(2, 8)
    gram[1, 1] = value
    with pytest.raises(NumericsError, match="NaN or infinite"):
        round_columns(weight, gram, torch.ones(2, 1), scheme_of("int4"))


def test_moments_that_are_not_positive_definite_are_refused():
    weight, _ = draw(2, 8)
    gram = torch.eye(8, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 5.0
    with pytest.raises(NumericsError, match="not positive definite"):
        round_columns(weight, gram, torch.ones(2, 1), scheme_of("int4"))
