"""Where each tensor of a folder goes in a GGUF file, and in which order its rows are there."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import TensorNameMap, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES

from mka.errors import CheckpointError
from mka.export.architectures import Architecture, list_factors, query_factor
from mka.export.carrying import choose_carrier, restore_numbers
from mka.export.ggml import FILE_TYPES, ROUNDED, Kind, choose_kind, count_row_bytes
from mka.model.checkpoint import Checkpoint
from mka.model.shards import BLOCK_BYTES
from mka.model.tensors import TensorInfo, TensorReader
from mka.transforms.unpacking import RoundedTensor, find_rounded, list_unpacked

# What an unrounded matrix of a rounded folder is stored as, by what the folder has.
_KEPT = {"BF16": Kind.BF16, "F16": Kind.F16}


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file.

    Attributes:
        name: as GGUF files have it.
        shape: rows first.
        kind: what it is stored as.
        source: the folder's tensor; None: made of the config.
        read: yields its rows, (R, W) float32, some at a time; of a vector the one row, (1, W).
        rounded: of weights that are stored rounded: yields rows of whole numbers, (R, W) int8, and their scales,
            (R, groups) float32, which a type of the file holds as they are.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    source: str | None
    read: Callable[[TensorReader], Iterator[np.ndarray]]
    rounded: Callable[[TensorReader], Iterator[tuple[np.ndarray, np.ndarray]]] | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, but for what fills up to the next tensor."""
        *rows, width = self.shape
        return (rows[0] if rows else 1) * count_row_bytes(width, self.kind)


def place_tensors(checkpoint: Checkpoint, config: Any, architecture: Architecture, file_type: str) -> list[FileTensor]:
    """Place every tensor of a folder in a file, and those that hold rotary scaling.

    Args:
        checkpoint: the folder; a head that is tied is left out.
        config: its, of transformers.
        architecture: its.
        file_type: a key of `FILE_TYPES`, or `ROUNDED` of a folder of rounded weights.

    Raises:
        CheckpointError: if llama.cpp would not read one of them, or they are rounded to what is not read here.
    """
    family, layers = checkpoint.family, checkpoint.layers
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(number, layers)
    tied, factor = bool(config.tie_word_embeddings), query_factor(config, architecture)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rounded = find_rounded(checkpoint) if file_type == ROUNDED else {}
    tensors = []
    for name, info in list_unpacked(checkpoint, rounded).items():
        if tied and name == family.head_tensor:
            continue  # held against the embedding when the folder was opened
        found = _name_tensor(names, name, architecture)
        module = found.split(".")[-2]
        treatment = _Treatment(
            offset=family.stored_offset(name),
            factor=factor if module == architecture.scaled else 1.0,
            heads=heads.get(module, 0) if architecture.interleaved else 0,
        )
        if file_type == ROUNDED:
            tensors.append(_keep(found, info, rounded.get(name), treatment))
        else:
            kind = choose_kind(found, info.shape, FILE_TYPES[file_type], layers, tied)
            tensors.append(FileTensor(found, info.shape, kind, name, treatment.bind(name)))
    for found, values in list_factors(config, architecture).items():
        tensors.append(FileTensor(found, (len(values),), Kind.F32, None, _say(values)))
    return tensors


def _keep(found: str, info: TensorInfo, rounded: RoundedTensor | None, treatment: "_Treatment") -> FileTensor:
    """Place a tensor of a rounded folder in the type that holds it as it is; float16 where there is none."""
    if rounded is None:
        kind = _KEPT.get(info.dtype, Kind.F32) if len(info.shape) > 1 else Kind.F32
        return FileTensor(found, info.shape, kind, info.name, treatment.bind(info.name))
    read, carrier = treatment.bind_rounded(rounded), choose_carrier(rounded.bits, rounded.group, info.shape[1])

    def restore(reader: TensorReader) -> Iterator[np.ndarray]:
        return (restore_numbers(numbers, scales) for numbers, scales in read(reader))

    if carrier is None:
        return FileTensor(found, info.shape, Kind.F16, info.name, restore)
    return FileTensor(found, info.shape, carrier, info.name, restore, read)


def _say(values: list[float]) -> Callable[[TensorReader], Iterator[np.ndarray]]:
    """Return what yields numbers that are made of the config."""
    return lambda read: iter([np.array([values], dtype=np.float32)])


def _name_tensor(names: TensorNameMap, name: str, architecture: Architecture) -> str:
    """Return a tensor's name in the file.

    Raises:
        CheckpointError: if llama.cpp would not read it.
    """
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None or (found.endswith(".bias") and found.split(".")[-2] not in architecture.biases):
        raise CheckpointError(
            f"tensor {name} has no place in GGUF architecture {architecture.name!r}, llama.cpp would leave it out; "
            "export it as a folder"
        )
    return str(found)


@dataclass(frozen=True)
class _Treatment:
    """How a tensor of the folder becomes one of the file.

    Attributes:
        offset: added to each weight.
        factor: that each is multiplied by then.
        heads: whose rows are put in the order in which neighbours turn; 0: rows stay.
    """

    offset: float
    factor: float
    heads: int

    def bind(self, name: str) -> Callable[[TensorReader], Iterator[np.ndarray]]:
        """Return what reads a tensor and treats it, some rows at a time."""
        return lambda read: self._read(read, name)

    def bind_rounded(self, tensor: RoundedTensor) -> Callable[[TensorReader], Iterator[tuple[np.ndarray, np.ndarray]]]:
        """Return what reads the whole numbers and scales of a matrix and treats them, some rows at a time."""
        return lambda read: self._read_rounded(read, tensor)

    def _read_rounded(self, read: TensorReader, tensor: RoundedTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # Offsets are those of norms, which are never rounded.
        for numbers, scales in tensor.blocks(read, 4 * tensor.info.parameters if self.heads else BLOCK_BYTES):
            found = numbers.numpy(), scales.numpy() * np.float32(self.factor)
            yield (_interleave(found[0], self.heads), _interleave(found[1], self.heads)) if self.heads else found

    def _read(self, read: TensorReader, name: str) -> Iterator[np.ndarray]:
        # A head's rows lie apart, and queries and keys are among the smaller matrices.
        blocks = (
            iter([read(name)]) if self.heads or len(read.tensors[name].shape) < 2 else read.blocks(name, BLOCK_BYTES)
        )
        for block in blocks:
            rows = block.float().numpy()
            if self.heads:
                rows = _interleave(rows, self.heads)
            if self.offset or self.factor != 1.0:
                rows = (rows + np.float32(self.offset)) * np.float32(self.factor)
            yield rows.reshape(1, -1) if rows.ndim < 2 else rows


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put each head's rows, (heads * 2 * D/2, ...), where row i turns with row i + D/2, into the order i, i + D/2."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # (heads, 2, D/2, ...)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
