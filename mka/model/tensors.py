"""Tensors read from safetensors files by plain reads, whole or some rows of them.

A mapped file counts as memory of the process for as long as it is open, page by page, up to the size of the model.
"""

import ctypes
import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from mka.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

# Dtypes of weights as they are trained and computed with, by safetensors' names.
FLOATS = ("F64", "F32", "F16", "BF16")
# What engines hold one of them in, in bfloat16, whatever it is stored in.
HALF_NBYTES = 2


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, without reading it.

    Attributes:
        name: of the tensor.
        file: of the folder.
        dtype: safetensors' name, e.g. "BF16".
        shape: of the tensor.
        start: byte of the file its data begin at.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def parameters(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.parameters * _BYTES.get(self.dtype, 1)


# Bytes let go of after which memory is given back.
TRIM_BYTES = 1 << 28


def give_memory_back() -> None:
    """Give free memory back to the system.

    Holes that aligned allocations leave in glibc's heap are seldom used again (before glibc 2.38): over hundreds of
    layers they would add up to the size of the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_finite(tensor: "torch.Tensor") -> bool:
    """Whether a tensor holds neither NaN nor infinity; both survive a minimum or a maximum."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
TORCH_NAMES |= {"F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
TORCH_NAMES |= {"BOOL": "bool"}
STORED_NAMES = {name: short for short, name in TORCH_NAMES.items()}


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return where tensor data begin in a safetensors file, in bytes, and what its header says of each tensor."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return 8 + length, {name: entry for name, entry in header.items() if name != "__metadata__"}


def torch_dtype(info: "TensorInfo") -> "torch.dtype":
    """Return the dtype a tensor has in memory.

    Raises:
        CheckpointError: if torch has none for it.
    """
    import torch

    if info.dtype not in TORCH_NAMES:
        raise CheckpointError(f"{info.name}: dtype {info.dtype} cannot be read; allowed: {', '.join(TORCH_NAMES)}")
    return getattr(torch, TORCH_NAMES[info.dtype])


class TensorReader:
    """Reads tensors of one folder; files are opened when first needed and closed with it. For one thread."""

    def __init__(self, folder: Path, tensors: Mapping[str, "TensorInfo"]) -> None:
        self.folder, self.tensors = folder, tensors
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, name: str, rows: slice | None = None, into: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Read a tensor.

        Args:
            name: of the tensor.
            rows: which of its rows; None for all. Without a step.
            into: bytes to read into, uint8 and at least as many as the tensor's; None for new memory.

        Raises:
            CheckpointError: if the file has become shorter than its header says.
        """
        import torch

        info = self.tensors[name]
        first, stop, _ = (rows or slice(None)).indices(info.shape[0] if info.shape else 1)
        shape = (stop - first, *info.shape[1:]) if info.shape else ()
        width = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
        dtype, nbytes = torch_dtype(info), math.prod(shape) * (info.nbytes // info.parameters if info.parameters else 0)
        tensor = torch.empty(shape, dtype=dtype) if into is None else into[:nbytes].view(dtype).view(shape)
        if not tensor.nbytes:
            return tensor
        if info.file not in self._files:
            self._files[info.file] = self._stack.enter_context((self.folder / info.file).open("rb"))
        file = self._files[info.file]
        file.seek(info.start + first * width)
        found = file.readinto(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[attr-defined]
        if found != tensor.nbytes:
            raise CheckpointError(f"{self.folder / info.file}: ends within {name}; fetch the model again")
        return tensor

    def blocks(self, name: str, nbytes: int) -> "Iterator[torch.Tensor]":
        """Read a tensor some rows at a time, as many as ``nbytes`` hold but at least one."""
        info = self.tensors[name]
        count = info.shape[0] if info.shape else 1
        step = max(1, nbytes * count // max(info.nbytes, 1))
        for first in range(0, count, step):
            yield self(name, slice(first, first + step))
