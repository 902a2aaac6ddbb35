"""Rounding of the linear layers to the nearest multiple of each group's or row's scale.

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
from mka.transforms.formats import describe_scheme
from mka.transforms.packing import check_roundable, choose_alike, foresee_packed, round_rows, write_packed

if TYPE_CHECKING:
    import torch


def quantize_checkpoint(source: Checkpoint, output: str | Path, settings: QuantizeSettings, **options: Any) -> Any:
    """Write a quantized copy of a checkpoint; options and result are those of `mka.transforms.packing.write_packed`.

    Raises:
        RecipeError: if widths, group size or embedding do not suit the settings.
        CheckpointError: if the source is quantized already.
        OutputError: if the folder cannot be written.
    """
    check_roundable(source, settings)

    scheme = describe_scheme(settings.scheme, settings.group_size)

    def pack(spec: TensorInfo, info: TensorInfo, read: TensorReader) -> Iterator["torch.Tensor"]:
        return round_rows(source, scheme, spec, info, read)

    return write_packed(source, output, settings, choose_alike(source, settings), pack, **options)


def _apply(
    source: Checkpoint, settings: QuantizeSettings, evidence: Mapping[str, Any], output: Path, **options: Any
) -> Any:
    return quantize_checkpoint(source, output, settings, **options)


TRANSFORM = Transform("rtn", "round weights", check_roundable, foresee_packed, _apply)
