"""A checkpoint written anew tensor by tensor: what transforms that look at one tensor at a time have in common."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CheckpointError, NumericsError
from mka.model.checkpoint import Checkpoint
from mka.model.companions import copy_companions
from mka.model.config import write_config
from mka.model.shards import BLOCK_BYTES, MAX_SHARD_BYTES, Blocks, write_tensors
from mka.model.tensors import TensorInfo, is_finite
from mka.store.publishing import publish
from mka.store.sums import write_sums

if TYPE_CHECKING:
    import torch


def refuse_quantized(source: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are packed.

    Raises:
        CheckpointError: if they are.
    """
    if source.is_quantized:
        raise CheckpointError(f"{source.path}: weights are already quantized; name the original model instead")


def refuse_overflow(weight: "torch.Tensor", name: str, dtype: "torch.dtype") -> None:
    """Refuse values of a tensor that are not finite in the dtype that a stock loader gives it.

    Raises:
        NumericsError: naming the tensor, and what to do.
    """
    if is_finite(weight.to(dtype)):
        return
    if not is_finite(weight):
        raise NumericsError(f"{name}: NaN or infinite weights cannot be rounded; the model is damaged")
    held = str(dtype).removeprefix("torch.")
    raise NumericsError(
        f"{name}: rounded, its values reach {float(weight.abs().max()):.6g}, beyond {held}, which it unpacks to; "
        "put `name: cast` with `settings: {dtype: bfloat16}` among the recipe's transforms"
    )


def publish_copy(
    source: Checkpoint,
    output: str | Path,
    write: Callable[[Path], Mapping[str, str]],
    *,
    needed_bytes: int,
    verify: Callable[[Path], Any] | None = None,
) -> Any:
    """Write a folder made of a checkpoint, with its companions and sums; publish it only once it is whole.

    Args:
        source: whose tokenizer and other small files go along.
        output: folder to publish; must not exist.
        write: writes weights and config.json into a folder; returns the digests of the weights' files.
        needed_bytes: what the disk has to have.
        verify: called with the finished folder before it is published; an exception from it publishes nothing.

    Returns:
        What ``verify`` returned.

    Raises:
        OutputError: if the folder cannot be written.
    """
    with publish(output, needed_bytes=needed_bytes + 64_000_000) as partial:
        sums = write(partial)
        copy_companions(source.path, partial)
        result = verify(partial) if verify else None
        write_sums(partial, sums)
        return result


def rewrite_checkpoint(
    source: Checkpoint,
    outline: Checkpoint,
    treat: Callable[[TensorInfo, "torch.Tensor"], "torch.Tensor"],
    output: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: Callable[[Path], Any] | None = None,
    on_tensor: Callable[[int], Any] | None = None,
) -> Any:
    """Write a stock folder whose tensors are made of the source's, some rows of one at a time; publish it once whole.

    Args:
        source: the checkpoint that is read.
        outline: the checkpoint that is written: its config, and name, dtype and shape of the same tensors.
        treat: ``treat(info, rows)`` returns what some whole rows of a tensor of the source become.
        output: folder to publish; must not exist.
        max_shard_bytes: largest shard.
        verify: called with the finished folder before it is published.
        on_tensor: called with the bytes of each tensor written (for a progress bar).

    Returns:
        What ``verify`` returned.

    Raises:
        OutputError: if the folder cannot be written.
    """

    def write(folder: Path) -> Mapping[str, str]:
        stream = _stream(source, outline, treat, on_tensor)
        write_config(folder, outline.config)
        return write_tensors(folder, list(outline.tensors.values()), stream, max_shard_bytes)

    return publish_copy(source, output, write, needed_bytes=outline.nbytes, verify=verify)


def replace_tensors(
    source: Checkpoint, values: Mapping[str, "torch.Tensor"], output: str | Path, **options: Any
) -> Any:
    """Write a copy of a checkpoint in which some tensors have other values, in the dtypes they are stored in.

    Args:
        source: the checkpoint that is read.
        values: tensor name -> its values.
        output: folder to publish; must not exist.
        options: for `rewrite_checkpoint`.

    Returns:
        What ``verify`` returned.

    Raises:
        CheckpointError: if the source has no such tensor.
        NumericsError: if a value is not finite in the stored dtype.
        OutputError: if the folder cannot be written.
    """
    if strange := sorted(values.keys() - source.tensors.keys()):
        raise CheckpointError(f"{source.path}: has no tensor {strange[0]} to give other values")
    written = dict.fromkeys(values, 0)

    def treat(info: TensorInfo, rows: "torch.Tensor") -> "torch.Tensor":
        if info.name not in values:
            return rows
        start = written[info.name]
        written[info.name] += len(rows)
        given = values[info.name][start : start + len(rows)].to(rows.dtype)
        if not is_finite(given):
            raise NumericsError(f"{info.name}: values are not finite as {info.dtype}; nothing was written")
        return given

    return rewrite_checkpoint(source, source, treat, output, **options)


def _stream(
    source: Checkpoint,
    outline: Checkpoint,
    treat: Callable[[TensorInfo, "torch.Tensor"], "torch.Tensor"],
    on_tensor: Callable[[int], Any] | None,
) -> Iterator[Blocks]:
    with source.reader() as read:
        for name, spec in outline.tensors.items():
            info = source.tensors[name]
            yield (treat(info, rows) for rows in read.blocks(name, BLOCK_BYTES))
            if on_tensor:
                on_tensor(spec.nbytes)
