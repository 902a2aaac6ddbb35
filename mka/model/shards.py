"""Tensors streamed into safetensors shards, hashed while they are written."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mka.errors import CheckpointError
from mka.model.tensors import TensorInfo, torch_dtype
from mka.model.weights import INDEX, SINGLE

if TYPE_CHECKING:
    import torch


Blocks = Iterable["torch.Tensor"]

MAX_SHARD_BYTES = 5_000_000_000
# Bytes read or written at a time. Memory of this size is used again by the next block; a larger piece gets new pages
# from the system every time, which costs more than the copy, and one write of it takes ten times as long.
BLOCK_BYTES = 1 << 23


def write_tensors(
    folder: Path,
    specs: Sequence[TensorInfo],
    tensors: Iterable[Blocks],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Stream tensors into safetensors shards, in the order given; see `write_shards`.

    Args:
        folder: where the shards go.
        specs: name, dtype and shape of each tensor, in order (``file`` is ignored).
        tensors: the tensors themselves in the same order, each as blocks of its rows (or as one block, the whole).
        max_shard_bytes: a shard is closed before it would exceed this.

    Returns:
        Shard -> SHA-256 of its bytes.
    """
    return write_shards(folder, split_shards(specs, max_shard_bytes), tensors)


def split_shards(specs: Sequence[TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[TensorInfo]]:
    """Divide tensors among shards; each is closed before it would exceed ``max_shard_bytes``."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def write_shards(folder: Path, shards: Sequence[Sequence[TensorInfo]], tensors: Iterable[Blocks]) -> dict[str, str]:
    """Stream tensors into safetensors shards: while one block of rows is hashed and written, the next is made.

    Shapes and dtypes are known beforehand, so each shard's header is written first and its tensors follow.

    Args:
        folder: where the shards go.
        shards: of each shard, name, dtype and shape of its tensors in order (``file`` is ignored).
        tensors: the tensors themselves in the same order, each as blocks of its rows (or as one block, the whole).

    Returns:
        Shard -> SHA-256 of its bytes.
    """
    specs = [spec for shard in shards for spec in shard]
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    stream = iter(tensors)
    with ThreadPoolExecutor(2) as pool:
        sums = {name: _write_shard(folder / name, shard, stream, pool) for name, shard in zip(names, shards)}
    # Asked for one more, a generator also finishes what it does after its last tensor.
    if next(stream, None) is not None:
        raise CheckpointError(f"{folder}: more tensors than the {len(specs)} planned")
    if count > 1:
        index = {
            "metadata": {"total_size": sum(s.nbytes for s in specs)},
            "weight_map": {s.name: name for name, shard in zip(names, shards) for s in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sums


def _write_shard(path: Path, specs: Sequence[TensorInfo], tensors: Iterator[Blocks], pool: Executor) -> str:
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns tensor data to 8 bytes
    with path.open("wb") as file:
        output = _HashedFile(file, pool)
        output.write(struct.pack("<Q", len(encoded)) + encoded)
        for spec in specs:
            written = 0
            for block in next(tensors):
                if block.dtype != torch_dtype(spec) or block.shape[1:] != spec.shape[1:]:
                    raise CheckpointError(f"{spec.name}: {tuple(block.shape)} {block.dtype}, planned {spec}")
                written += block.nbytes
                output.write(block.contiguous().view(-1).view(torch.uint8).numpy())
            if written != spec.nbytes:
                raise CheckpointError(f"{spec.name}: {written} bytes, planned {spec}")
        return output.finish()


class _HashedFile:
    """Hashes and writes at the same time, while its caller makes what comes next."""

    def __init__(self, file: BinaryIO, pool: Executor) -> None:
        self.file, self.pool = file, pool
        self.digest = hashlib.sha256()
        self.pending: list[Future[Any]] = []

    def write(self, data: Any) -> None:
        """Take data over once what was given before is written; they must not be changed."""
        for start in range(0, len(data), BLOCK_BYTES):
            part = data[start : start + BLOCK_BYTES]
            self._wait()
            self.pending = [self.pool.submit(self.digest.update, part), self.pool.submit(self.file.write, part)]

    def finish(self) -> str:
        """Return the SHA-256 of everything written."""
        self._wait()
        return self.digest.hexdigest()

    def _wait(self) -> None:
        for future in self.pending:
            future.result()
