"""Which number type a tensor gets, and how far rounded weights may be off."""

import numpy as np
import pytest
from gguf import quantize

from mka.export import _EXPORTS
from mka.export.ggml import FILE_TYPES, ROUNDED, Kind, choose_kind, is_within, restore_rows, round_rows


def test_the_types_that_can_be_asked_for_are_those_there_are():
    assert set(_EXPORTS["gguf"].types) == {*FILE_TYPES, ROUNDED}


def test_layers_that_get_more_bits_are_those_of_llama_cpps_mixture():
    kinds = [choose_kind(f"blk.{i}.ffn_down.weight", (8, 256), FILE_TYPES["q4_k_m"], 30, False) for i in range(30)]
    # Of 30: three at either end (30 / 8; from 26 on it is four), and the last of three in between.
    more = [i for i, kind in enumerate(kinds) if kind == Kind.Q6_K]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert {kind for i, kind in enumerate(kinds) if i not in more} == {Kind.Q4_K}


@pytest.mark.parametrize(
    ("name", "shape", "file_type", "tied", "kind"),
    [
        ("output.weight", (8, 256), "q4_k_m", False, Kind.Q6_K),
        ("token_embd.weight", (8, 256), "q4_k_m", False, Kind.Q4_K),
        ("token_embd.weight", (8, 256), "q4_k_m", True, Kind.Q6_K),
        ("token_embd.weight", (8, 64), "q4_0", True, Kind.Q8_0),
        ("blk.3.attn_qkv.weight", (8, 256), "q4_k_m", False, Kind.Q5_K),
        ("blk.3.attn_q.weight", (8, 576), "q4_k_m", False, Kind.Q5_0),
        ("blk.3.attn_q.weight", (8, 576), "q5_k_m", False, Kind.Q5_1),
        ("blk.3.attn_q.weight", (8, 576), "q6_k", False, Kind.Q8_0),
        ("blk.3.attn_q.weight", (8, 48), "q6_k", False, Kind.F16),
        ("blk.3.attn_norm.weight", (256,), "q4_0", False, Kind.F32),
    ],
)
def test_a_tensor_gets_its_type(name, shape, file_type, tied, kind):
    assert choose_kind(name, shape, FILE_TYPES[file_type], 30, tied) == kind


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_0])
@pytest.mark.parametrize("size", [1e-6, 0.02, 300.0])
def test_rounding_is_within_and_another_order_of_rows_is_not(kind, size):
    """Weights with long tails, as trained ones have, of any size a half-precision scale can hold."""
    rows = (np.random.default_rng(0).standard_t(3, (64, 256)) * size).astype(np.float32)
    found = restore_rows(round_rows(rows, kind, "w"), kind)
    assert is_within(rows, found, kind)
    assert size < 1e-3 or not is_within(rows, np.roll(found, 1, axis=0), kind)
    found[5, 7] = np.nan
    assert not is_within(rows, found, kind)


def test_rounding_is_that_of_the_package():
    rows = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    assert (round_rows(rows, Kind.Q8_0, "w") == quantize(rows, Kind.Q8_0)).all()
    assert (round_rows(rows, Kind.F32, "w").view(np.float32) == rows).all()
