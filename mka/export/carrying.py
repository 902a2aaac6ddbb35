"""Weights that are whole numbers times scales already, put into llama.cpp's blocks with the numbers as they are.

Rounding them again would be to other steps: a type's quantizer takes its scale from the largest weight of 16 or 32,
which is seldom the one they were rounded with. Layouts are those of llama.cpp's ``ggml-common.h``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Kind

from mka.errors import NumericsError
from mka.export.ggml import count_row_bytes

# Half a step of the smallest float16.
_HALF_STEP = 2.0**-25


@dataclass(frozen=True)
class Carrier:
    """A type that holds whole numbers of so many bits.

    Attributes:
        bits: of a number.
        group: weights that share a scale.
        levels: largest whole number that a scale itself is, times one float16 per block; None: it is a float16.
        pack: makes blocks (N, bytes) of numbers (N, block), raised to start at 0, and scales (N, block / group).
        number: what readers are told a file is that has most of its rounded weights in this type.
    """

    bits: int
    group: int
    levels: int | None
    pack: Callable[[np.ndarray, np.ndarray], np.ndarray]
    number: LlamaFileType


def choose_carrier(bits: int, group: int, width: int) -> Kind | None:
    """Return the smallest type that holds whole numbers as they are; None if there is none.

    Args:
        bits: of a number.
        group: weights that share a scale.
        width: of a row.
    """
    for kind, carrier in CARRIERS.items():
        if carrier.bits >= bits and group % carrier.group == 0 and width % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return None


def carry_rows(numbers: np.ndarray, scales: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """Store whole numbers as they are, and their scales as well as a type can.

    Args:
        numbers: (R, W) int8.
        scales: (R, groups) float32.
        kind: what `choose_carrier` returned.
        name: of the tensor, for a refusal.

    Returns:
        (R, bytes of a row), uint8.

    Raises:
        NumericsError: if a scale is not finite, or beyond what the type can hold.
    """
    carrier, size = CARRIERS[kind], GGML_QUANT_SIZES[kind][0]
    rows, width = numbers.shape
    spread = _spread(scales, width, carrier.group).reshape(-1, size // carrier.group)
    if not np.isfinite(spread).all():
        raise NumericsError(f"{name}: holds scales that are not finite; make the model again")
    if spread.max(initial=0.0) > np.finfo(np.float16).max:
        raise NumericsError(f"{name}: holds scales beyond float16's 65504; export it as a folder")
    raised = (numbers.astype(np.int16) + 2 ** (carrier.bits - 1)).astype(np.uint8).reshape(-1, size)
    return carrier.pack(raised, spread).reshape(rows, count_row_bytes(width, kind))


def is_carried(numbers: np.ndarray, scales: np.ndarray, found: np.ndarray, kind: Kind) -> bool:
    """Whether weights (R, W) that were read back are the numbers times their scales, as well as a type holds scales.

    Args:
        numbers: (R, W) int8.
        scales: (R, groups) float32.
        found: (R, W) float32.
        kind: of the tensor.
    """
    carrier, size = CARRIERS[kind], GGML_QUANT_SIZES[kind][0]
    spread = _spread(scales, numbers.shape[1], carrier.group)
    off = spread * 2.0**-11 + _HALF_STEP
    if carrier.levels is not None:
        blocks = spread.reshape(len(spread), -1, size // carrier.group)
        largest = np.broadcast_to(blocks.max(axis=2, keepdims=True), blocks.shape).reshape(spread.shape)
        # Half a step of a scale, and what the float16 behind all of a block's is off.
        off = largest * (0.5 / carrier.levels + 2.0**-10) + carrier.levels * _HALF_STEP
    wanted = restore_numbers(numbers, spread)
    allowed = np.abs(numbers.astype(np.float32)) * np.repeat(off, carrier.group, axis=1)
    # Products are rounded to float32 once here and once where they are read.
    return bool((np.abs(wanted - found) <= allowed + np.abs(wanted) * 2.0**-22).all())


def restore_numbers(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the weights (R, W) float32 that whole numbers (R, W) and scales (R, groups) are."""
    return numbers * np.repeat(scales, numbers.shape[1] // scales.shape[1], axis=1)


def _spread(scales: np.ndarray, width: int, group: int) -> np.ndarray:
    """Repeat scales for each of the smaller groups that a type has, (R, width / group)."""
    return np.repeat(scales, width // group // scales.shape[1], axis=1)


def _view_half(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float16).view(np.uint8)


def _pack_q8_0(raised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.hstack([_view_half(scales), raised ^ np.uint8(128)])


def _pack_q5_0(raised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    high = np.packbits(raised >> 4, axis=1, bitorder="little")
    return np.hstack([_view_half(scales), high, _fold(raised & 15, 16, 4)])


def _pack_q4_0(raised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.hstack([_view_half(scales), _fold(raised, 16, 4)])


def _pack_q6_k(raised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    levels, step = _round_scales(scales, Kind.Q6_K)
    return np.hstack([_fold(raised & 15, 64, 4), _fold(raised >> 4, 32, 2), levels, step])


def _pack_q3_k(raised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    levels, step = _round_scales(scales, Kind.Q3_K)
    levels += 32
    told = [_fold(levels & 15, 8, 4), _fold(levels >> 4, 4, 2)]
    return np.hstack([_fold(raised >> 2, 32, 1), _fold(raised & 3, 32, 2), *told, step])


def _pack_q2_k(raised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    # Weights are scale * number - offset here; twice the scale puts numbers of 0 to 3 back to -2 to 1.
    levels, step = _round_scales(scales, Kind.Q2_K)
    twice = _view_half(2 * step.view(np.float16))
    return np.hstack([levels | levels << 4, _fold(raised, 32, 2), step, twice])


def _round_scales(scales: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Return a block's scales as whole numbers (N, groups) uint8, and the bytes of the float16 they are times."""
    most = CARRIERS[kind].levels
    assert most is not None, "the scales of this type are float16"
    step = (scales.max(axis=1, keepdims=True) / most).astype(np.float16)
    steps = step.astype(np.float32)
    levels = np.divide(scales, steps, out=np.zeros_like(scales), where=steps > 0)
    return levels.round().clip(0, most).astype(np.uint8), step.view(np.uint8)


def _fold(values: np.ndarray, stride: int, bits: int) -> np.ndarray:
    """Put values (N, W) of a few bits into bytes, the first of those that are ``stride`` apart lowest."""
    parts = values.reshape(len(values), -1, 8 // bits, stride)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    return np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(values), -1)


# The smallest first.
CARRIERS = {
    Kind.Q2_K: Carrier(2, 16, 15, _pack_q2_k, LlamaFileType.MOSTLY_Q2_K),
    Kind.Q3_K: Carrier(3, 16, 31, _pack_q3_k, LlamaFileType.MOSTLY_Q3_K_M),
    Kind.Q4_0: Carrier(4, 32, None, _pack_q4_0, LlamaFileType.MOSTLY_Q4_0),
    Kind.Q5_0: Carrier(5, 32, None, _pack_q5_0, LlamaFileType.MOSTLY_Q5_0),
    Kind.Q6_K: Carrier(6, 16, 127, _pack_q6_k, LlamaFileType.MOSTLY_Q6_K),
    Kind.Q8_0: Carrier(8, 32, None, _pack_q8_0, LlamaFileType.MOSTLY_Q8_0),
}
