"""Sizes in bytes, as people write them and as they are told."""

import math

import pytest

from mka.outside.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        *(("90MB", 90e6), ("90 mb", 90e6), ("0.5GB", 5e8), (".045MB", 45e3), ("45KB", 45e3), ("45kb", 45e3)),
        *((" 1.5TB ", 1.5e12), ("12B", 12), ("12", 12), ("2KiB", 2048), ("0.5 MiB", 524_288), ("1gib", 2**30)),
    ],
)
def test_a_size_is_a_number_and_a_unit(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("given", [90, 1.5, None, True, ["90MB"], "45e3", "-5"])
def test_what_is_no_size_but_may_be_a_number_is_left_to_the_field(given):
    assert parse_size(given) is given


@pytest.mark.parametrize("text", ["", "MB", "90XB", "1_000B", "12iB", "-5MB", "4.5e4B", "nan", "90 M B", "1,5MB"])
def test_what_is_no_size_names_the_units(text):
    with pytest.raises(ValueError, match="a size like 90MB: a number, and B, kB, MB, GB, TB or KiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "told"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (62_026_272, "62.026 MB"), (2.5e9, "2.5 GB")]
)
def test_sizes_are_told_with_three_decimals_at_most(nbytes, told):
    assert format_size(nbytes) == told


def test_what_is_told_can_be_rounded_to_the_safe_side():
    assert (format_size(1_000_000.1, math.ceil), format_size(1_999_999, math.floor)) == ("1.001 MB", "1.999 MB")
