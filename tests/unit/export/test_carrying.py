"""Whole numbers in llama.cpp's blocks: what the package gguf reads of them is what they were."""

import numpy as np
import pytest
from gguf import dequantize

from mka.errors import NumericsError
from mka.export.carrying import CARRIERS, carry_rows, choose_carrier, is_carried, restore_numbers
from mka.export.ggml import Kind

# Bits, and whole numbers that a scale can be; float16 alone where there are none.
TYPES = {
    Kind.Q2_K: (2, 15),
    Kind.Q3_K: (3, 31),
    Kind.Q4_0: (4, None),
    Kind.Q5_0: (5, None),
    Kind.Q6_K: (6, 127),
    Kind.Q8_0: (8, None),
}


def draw_numbers(bits, shape=(6, 512), seed=0):
    numbers = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
    assert len(np.unique(numbers)) == 2**bits
    return numbers


def test_every_type_is_looked_at():
    assert CARRIERS.keys() == TYPES.keys()


@pytest.mark.parametrize(("kind", "bits", "levels"), [(kind, *told) for kind, told in TYPES.items()])
@pytest.mark.parametrize("group", [32, 64, 512])
def test_scales_that_a_type_can_hold_are_read_back_as_they_are(group, kind, bits, levels):
    """Float16 of few digits, or multiples of one of which a block has the largest."""
    numbers = draw_numbers(bits)
    drawn = np.random.default_rng(1).integers(1, (levels or 2000) + 1, (6, 512 // group))
    if levels is not None:
        drawn[:, :: max(1, 256 // group)] = levels
    scales = (drawn * 2.0**-12).astype(np.float32)
    found = dequantize(carry_rows(numbers, scales, kind, "w"), kind)
    assert (found == numbers * np.repeat(scales, group, axis=1)).all()


@pytest.mark.parametrize(("kind", "bits", "levels"), [(kind, *told) for kind, told in TYPES.items()])
@pytest.mark.parametrize("size", [1e-4, 0.01, 50.0])
def test_other_scales_are_half_a_step_off_at_most(size, kind, bits, levels):
    numbers = draw_numbers(bits)
    scales = (np.random.default_rng(2).lognormal(size=(6, 16)) * size).astype(np.float32)
    found = dequantize(carry_rows(numbers, scales, kind, "w"), kind)
    spread = np.repeat(scales, 32, axis=1)
    # Of a float16, whose steps end at 2**-24; or of a scale whose 256 weights have as many levels as there are.
    off = spread * 2.0**-11 + 2.0**-25
    if levels is not None:
        largest = scales.reshape(6, 2, 8).max(axis=2).repeat(256, axis=1)
        off = largest * (0.5 / levels + 2.0**-10) + levels * 2.0**-25
    # Float32 rounds the products.
    assert (np.abs(found - numbers * spread) <= np.abs(numbers.astype(float)) * off * (1 + 1e-5)).all()
    assert is_carried(numbers, scales, found, kind)


@pytest.mark.parametrize(("kind", "bits"), [(kind, bits) for kind, (bits, _) in TYPES.items()])
def test_other_numbers_scales_and_rows_are_told_from_them(kind, bits):
    numbers, scales = draw_numbers(bits), np.full((6, 16), 0.01, dtype=np.float32)
    found = dequantize(carry_rows(numbers, scales, kind, "w"), kind)
    assert is_carried(numbers, scales, found, kind)
    assert not is_carried(numbers, scales, np.roll(found, 1, axis=0), kind)
    assert not is_carried(numbers, 1.1 * scales, found, kind)
    for value in (np.nan, found[5, 7] + 0.01):
        wrong = found.copy()
        wrong[5, 7] = value
        assert not is_carried(numbers, scales, wrong, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_groups_without_a_scale_are_zero(kind):
    numbers, scales = draw_numbers(2), np.zeros((6, 8), dtype=np.float32)
    assert (dequantize(carry_rows(numbers, scales, kind, "w"), kind) == 0).all()


@pytest.mark.parametrize(
    ("bits", "group", "width", "kind"),
    [
        (8, 64, 576, Kind.Q8_0),
        (7, 64, 576, Kind.Q8_0),
        (6, 64, 576, Kind.Q8_0),
        (6, 64, 768, Kind.Q6_K),
        (5, 32, 576, Kind.Q5_0),
        (4, 128, 256, Kind.Q4_0),
        (3, 64, 576, Kind.Q4_0),
        (3, 16, 512, Kind.Q3_K),
        (2, 64, 576, Kind.Q4_0),
        (2, 48, 768, Kind.Q2_K),
        # A type of 32 with one scale does not hold groups of 16 or 48; the next that does is larger.
        (4, 16, 512, Kind.Q6_K),
        (5, 48, 768, Kind.Q6_K),
        (8, 16, 512, None),
        (4, 16, 576, None),
        (2, 8, 512, None),
        (8, 48, 48, None),
    ],
)
def test_the_smallest_type_that_holds_them_is_taken(bits, group, width, kind):
    assert choose_carrier(bits, group, width) == kind


def test_weights_are_numbers_times_the_scale_of_their_group():
    numbers = np.array([[1, -2, 3, 4], [0, 1, -1, 2]], dtype=np.int8)
    scales = np.array([[0.5, 2.0], [1.0, 0.25]], dtype=np.float32)
    assert restore_numbers(numbers, scales).tolist() == [[0.5, -1.0, 6.0, 8.0], [0.0, 1.0, -0.25, 0.5]]


@pytest.mark.parametrize(
    ("scale", "message"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e5, "beyond float16")]
)
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q6_K])
def test_scales_that_no_type_holds_are_refused_by_the_name_of_their_tensor(kind, scale, message):
    with pytest.raises(NumericsError, match=f"^proj: .*{message}"):
        carry_rows(draw_numbers(4), np.full((6, 8), scale, dtype=np.float32), kind, "proj")
