"""Weight-only rounding of the linear layers to the nearest multiple of each group's scale.

Data-free, so nothing has to be run: weights are read, rounded by compressed-tensors' own functions and written a block
of rows at a time, as `mka.transforms.packing` lays them out.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.model.checkpoint import Checkpoint
from mka.model.tensors import TensorInfo, TensorReader
from mka.recipe import QuantizeSettings
from mka.transforms import Transform
from mka.transforms.packing import check_roundable, foresee_packed, pack_rows, read_rows, scale_groups, write_packed

if TYPE_CHECKING:
    import torch

# Bytes of a matrix rounded at a time; rounding and packing them takes some ten times as many.
_ROUND_BYTES = 1 << 22


def quantize_checkpoint(source: Checkpoint, output: str | Path, settings: QuantizeSettings, **options: Any) -> Any:
    """Write a quantized copy of a checkpoint; options and result are those of `mka.transforms.packing.write_packed`.

    Raises:
        RecipeError: if the group size does not divide the widths.
        CheckpointError: if the source is quantized already.
        OutputError: if the folder cannot be written.
    """
    check_roundable(source, settings)

    def pack(spec: TensorInfo, info: TensorInfo, read: TensorReader) -> Iterator["torch.Tensor"]:
        leaf = spec.name.rpartition(".")[2]
        # A weight is read once for its scale and once more to be packed: scales kept from the first time would be
        # memory that grows with the model.
        for rows in read_rows(source, info, read, _ROUND_BYTES):
            yield pack_rows(rows, scale_groups(rows, settings), settings)[leaf]

    return write_packed(source, output, settings, pack, **options)


def _apply(
    source: Checkpoint, settings: QuantizeSettings, evidence: Mapping[str, Any], output: Path, **options: Any
) -> Any:
    return quantize_checkpoint(source, output, settings, **options)


TRANSFORM = Transform("rtn", "round weights", check_roundable, foresee_packed, _apply)
