"""The number types of llama.cpp: which tensor gets which, how rows are rounded to them, and how far off they may be.

Mixtures and substitutes are those of llama.cpp's quantizer (`llama-quantize`), but for the head of ``q4_0``.
"""

import ctypes
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType, dequantize, quantize
from gguf import GGMLQuantizationType as Kind

from mka.errors import NumericsError, RecipeError


@dataclass(frozen=True)
class FileType:
    """What ``--type`` names; vectors are float32 in every one of them.

    Attributes:
        number: what readers are told the file is.
        matrix: type of matrices.
        head: of the head, and of an embedding that is tied to it.
        more: of values and of what writes the MLP's output, in the layers that get more bits.
        fused: of query, key and value in one.
    """

    number: LlamaFileType
    matrix: Kind
    head: Kind
    more: Kind | None = None
    fused: Kind | None = None

    @property
    def kinds(self) -> set[Kind]:
        """All types a file of this one may hold where widths allow it."""
        return {kind for kind in (self.matrix, self.head, self.more, self.fused) if kind is not None}


@dataclass(frozen=True)
class Rounding:
    """How far a rounded weight may be from what it was.

    Attributes:
        group: weights, one behind the other in a row, that share their scales.
        share: of the largest magnitude in the group.
        steps: largest whole number that a scale in float16 is multiplied by; each adds a scale's own least step.
    """

    group: int
    share: float
    steps: int


FILE_TYPES = {
    "f32": FileType(LlamaFileType.ALL_F32, Kind.F32, Kind.F32),
    "f16": FileType(LlamaFileType.MOSTLY_F16, Kind.F16, Kind.F16),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, Kind.BF16, Kind.BF16),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0, Kind.Q8_0),
    "q6_k": FileType(LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K, Kind.Q6_K),
    "q5_k_m": FileType(LlamaFileType.MOSTLY_Q5_K_M, Kind.Q5_K, Kind.Q6_K, Kind.Q6_K, Kind.Q6_K),
    "q4_k_m": FileType(LlamaFileType.MOSTLY_Q4_K_M, Kind.Q4_K, Kind.Q6_K, Kind.Q6_K, Kind.Q5_K),
    # Its head is q6_k with llama.cpp's quantizer; the package gguf cannot round to that.
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, Kind.Q4_0, Kind.Q8_0),
}
# Asked for as a type is: whole numbers that the folder has stay what they are, each tensor in the type that holds them.
ROUNDED = "rounded"
# Of a type whose groups do not fill a row evenly.
_SUBSTITUTES = {Kind.Q6_K: Kind.Q8_0, Kind.Q5_K: Kind.Q5_1, Kind.Q4_K: Kind.Q5_0}
# Types only llama.cpp itself rounds to.
_K_QUANTS = frozenset(_SUBSTITUTES)
_ROUNDINGS = {
    Kind.F32: Rounding(1, 0.0, 0),
    Kind.F16: Rounding(1, 2.0**-11, 1),
    Kind.BF16: Rounding(1, 2.0**-8, 0),
    Kind.Q8_0: Rounding(32, 1 / 254 + 2.0**-10, 127),
    Kind.Q5_0: Rounding(32, 1 / 16 + 2.0**-10, 16),
    Kind.Q5_1: Rounding(32, 1 / 31 + 3 * 2.0**-10, 32),
    Kind.Q4_0: Rounding(32, 1 / 8 + 2.0**-10, 8),
    # Scales of these are themselves whole numbers, chosen for the least squared error of the group and not for its
    # largest weight, so there is no closed bound: these shares tell a wrong tensor from a rounded one.
    Kind.Q6_K: Rounding(256, 0.08, 32 * 128),
    Kind.Q5_K: Rounding(256, 0.12, 32 * 64),
    Kind.Q4_K: Rounding(256, 0.20, 16 * 64),
}
_HALF_STEP = 2.0**-25
_HEAD, _EMBEDDING, _VALUE, _DOWN, _FUSED = "output.weight", "token_embd.weight", "attn_v", "ffn_down", "attn_qkv"


def choose_kind(name: str, shape: tuple[int, ...], file_type: FileType, layers: int, tied: bool) -> Kind:
    """Return the type a tensor is stored in.

    Args:
        name: as GGUF files have it.
        shape: rows first.
        file_type: of the file.
        layers: of the model.
        tied: whether the embedding is the head.
    """
    if len(shape) < 2:
        return Kind.F32
    kind = file_type.matrix
    place = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if name == _HEAD or (name == _EMBEDDING and tied):
        kind = file_type.head
    elif place and place[2] == _FUSED:
        kind = file_type.fused or kind
    elif place and place[2] in (_VALUE, _DOWN) and _gets_more(int(place[1]), layers):
        kind = file_type.more or kind
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = _SUBSTITUTES.get(kind, Kind.F16)
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else Kind.F16


def _gets_more(layer: int, layers: int) -> bool:
    """Whether a layer is in the first or the last eighth, or the last of three in between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def count_row_bytes(width: int, kind: Kind) -> int:
    """Return the bytes of a row of ``width`` weights."""
    group, nbytes = GGML_QUANT_SIZES[kind]
    return width // group * nbytes


def round_rows(rows: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """Round weights.

    Args:
        rows: (R, W) float32.
        kind: type to round to; its groups fill a row.
        name: of the tensor, for a refusal.

    Returns:
        (R, bytes of a row), uint8.

    Raises:
        NumericsError: if a weight is not finite, or not in the type's range.
    """
    if not np.isfinite(rows).all():
        raise NumericsError(f"{name}: holds weights that are not finite; make the model again")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if kind in _K_QUANTS:
        return _quantize_natively(rows, kind)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = quantize(rows, kind)
    if kind == Kind.F16 and not np.isfinite(rounded).all():
        raise NumericsError(f"{name}: holds weights beyond float16's 65504; take another type, bf16 for example")
    return rounded.view(np.uint8).reshape(len(rows), count_row_bytes(rows.shape[1], kind))


def restore_rows(data: np.ndarray, kind: Kind) -> np.ndarray:
    """Return the weights (R, W) float32 of rounded rows (R, bytes), uint8."""
    return dequantize(data, kind)


def is_within(rows: np.ndarray, found: np.ndarray, kind: Kind) -> bool:
    """Whether weights (R, W) that were read back are the given ones, as well as their type can hold them."""
    rounding = _ROUNDINGS[kind]
    groups = np.abs(rows).reshape(len(rows), -1, rounding.group)
    allowed = groups.max(axis=2, keepdims=True) * rounding.share + rounding.steps * _HALF_STEP
    return bool((np.abs(rows - found).reshape(groups.shape) <= allowed).all())


def require_quantizer(name: str) -> None:
    """Refuse a file type that needs llama.cpp's quantizer where there is none.

    Raises:
        RecipeError: naming what offers it, and the types that need nothing.
    """
    if FILE_TYPES[name].kinds & _K_QUANTS and _find_quantizer() is None:
        free = [other for other, file_type in FILE_TYPES.items() if not file_type.kinds & _K_QUANTS]
        raise RecipeError(
            f"type {name!r} is rounded by llama.cpp itself, which the package xllamacpp offers (it is not installed, "
            f"or offers it no more); without it: {', '.join(free)}"
        )


@cache
def _find_quantizer() -> Callable[..., int] | None:
    """Return llama.cpp's ``ggml_quantize_chunk``; None where it is not to be had.

    The package has no Python function for it. Its library exports the one that llama.cpp's own quantizer calls, whose
    parameters have stayed the same since 2024.
    """
    try:
        library: Any = ctypes.CDLL(str(importlib.import_module("xllamacpp.xllamacpp").__file__))
        function = library.ggml_quantize_chunk
    except (ImportError, OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    function.restype = ctypes.c_size_t
    return function


def _quantize_natively(rows: np.ndarray, kind: Kind) -> np.ndarray:
    function = _find_quantizer()
    assert function is not None, "require_quantizer was not asked"
    count, width = rows.shape
    data = np.empty((count, count_row_bytes(width, kind)), dtype=np.uint8)
    written = function(int(kind), rows.ctypes.data, data.ctypes.data, 0, count, width, None)
    if written != data.nbytes:
        raise NumericsError(f"llama.cpp wrote {written} bytes of {kind.name} where {data.nbytes} were due")
    return data
