"""A GGUF file read back before it gets its name: every tensor is there, in its shape, with its values."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from mka.errors import OutputError
from mka.export.carrying import is_carried
from mka.export.ggml import count_row_bytes, is_within, restore_rows
from mka.export.placing import FileTensor
from mka.model.tensors import TensorReader


def check_file(path: Path, name: str, tensors: Sequence[FileTensor], read: TensorReader) -> None:
    """Hold a file against the tensors it was made of, some rows at a time.

    Args:
        path: of the file.
        name: it will have, for a refusal.
        tensors: it has to hold, and no others.
        read: reads the folder's.

    Raises:
        OutputError: if one is missing, or has another shape, type or values than its type can tell from the source's.
    """
    try:
        found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError) as error:
        raise OutputError(f"{name}: cannot be read back: {error}; nothing was kept") from None
    if found.keys() != {tensor.name for tensor in tensors}:
        raise OutputError(f"{name}: holds {len(found)} tensors, {len(tensors)} were written; nothing was kept")
    with path.open("rb") as file:
        for tensor in tensors:
            place = found[tensor.name]
            shape = tuple(int(size) for size in reversed(place.shape))
            if (shape, place.tensor_type) != (tensor.shape, tensor.kind):
                raise OutputError(
                    f"{name}: {tensor.name} reads back as {place.tensor_type.name} {shape}, written were "
                    f"{tensor.kind.name} {tensor.shape}; nothing was kept"
                )
            width = count_row_bytes(tensor.shape[-1], tensor.kind)
            file.seek(int(place.data_offset))
            for is_held, count in _list_blocks(tensor, read):
                data = np.fromfile(file, dtype=np.uint8, count=count * width)
                if data.size < count * width or not is_held(restore_rows(data.reshape(count, width), tensor.kind)):
                    raise OutputError(
                        f"{name}: {tensor.name} reads back further from {tensor.source or 'its values'} than "
                        f"{tensor.kind.name} rounds; nothing was kept: try again, and on another disk"
                    )


def _list_blocks(tensor: FileTensor, read: TensorReader) -> Iterator[tuple[Callable[[np.ndarray], bool], int]]:
    """Yield what tells of rows that were read back whether they are the folder's, and how many; block after block."""
    if tensor.rounded is None:
        for rows in tensor.read(read):
            yield partial(is_within, rows, kind=tensor.kind), len(rows)
    else:
        for numbers, scales in tensor.rounded(read):
            yield partial(is_carried, numbers, scales, kind=tensor.kind), len(numbers)
