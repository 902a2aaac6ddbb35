"""Folders written whole or not at all: tensors streamed into shards, published by one rename."""

import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.checkpoint import INDEX, SINGLE, TensorInfo
from mka.errors import CheckpointError, OutputError
from mka.sums import SUMS_NAME

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5_000_000_000
# Left behind when a folder is derived from another: weights, what describes them, and code.
_NOT_COPIED = re.compile(
    r"(.*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|py|index\.json)|config\.json|README\.md|"
    + SUMS_NAME
    + r"|\..*)"
)
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextmanager
def publish(output: str | Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder beside ``output``; rename it into place when the block ends without an exception.

    Nothing is left behind when it does not: ``output`` either holds the whole result or does not exist.

    Args:
        output: the folder to publish; must not exist.
        needed_bytes: refuse early if the disk has less room than this.

    Raises:
        OutputError: if ``output`` exists, cannot be written, or the disk is full.
    """
    output = Path(output)
    if output.exists():
        raise OutputError(f"output {output} exists; choose another folder or remove it")
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        _make_room(output.parent, partial)
        free = shutil.disk_usage(partial).free
        if needed_bytes > free:
            raise OutputError(
                f"disk full: {output} needs {needed_bytes / 1e6:,.0f} MB, {output.parent} has {free / 1e6:,.0f} MB free"
            )
        yield partial
        partial.replace(output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"disk full while writing {output}; free some space and run again") from None
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(f"output {output} appeared while it was being written; nothing was replaced") from None
        if isinstance(error, PermissionError | NotADirectoryError) or error.errno == errno.EROFS:
            raise OutputError(f"output {output} cannot be written: {error.strerror}") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_room(parent: Path, partial: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"output cannot be written in {parent}: {error.strerror or error}") from None


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights and config: tokenizer, generation config, licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not _NOT_COPIED.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)


def write_tensors(
    folder: Path,
    specs: Sequence[TensorInfo],
    tensors: Iterable["torch.Tensor"],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Stream tensors into safetensors shards, one tensor in memory at a time.

    Shapes and dtypes are known beforehand, so each shard's header is written first and its tensors follow.

    Args:
        folder: where the shards go.
        specs: name, dtype and shape of each tensor, in order (``file`` is ignored).
        tensors: the tensors themselves, in the same order.
        max_shard_bytes: a shard is closed before it would exceed this.
    """
    shards: list[list[TensorInfo]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + spec.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    stream = iter(tensors)
    for name, shard in zip(names, shards):
        _write_shard(folder / name, shard, stream)
    # Asked for one more, a generator also finishes what it does after its last tensor.
    if next(stream, None) is not None:
        raise CheckpointError(f"{folder}: more tensors than the {len(specs)} planned")
    if count > 1:
        index = {
            "metadata": {"total_size": sum(s.nbytes for s in specs)},
            "weight_map": {s.name: name for name, shard in zip(names, shards) for s in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, specs: Sequence[TensorInfo], tensors: Iterator["torch.Tensor"]) -> None:
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
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for spec in specs:
            tensor = next(tensors)
            expected = TORCH_NAMES.get(spec.dtype)
            if tuple(tensor.shape) != spec.shape or (expected and tensor.dtype != getattr(torch, expected)):
                raise CheckpointError(f"{spec.name}: {tuple(tensor.shape)} {tensor.dtype}, planned {spec}")
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
