"""Floating-point tensors stored in another dtype: ``tensor.to(dtype)``, which rounds to nearest, ties to even."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mka.errors import NumericsError
from mka.model.checkpoint import Checkpoint
from mka.model.tensors import STORED_NAMES, TensorInfo, is_finite
from mka.sections import Section
from mka.transforms import Transform
from mka.transforms.rewrite import refuse_quantized, rewrite_checkpoint

if TYPE_CHECKING:
    import torch


class Settings(Section):
    """Settings of a cast."""

    dtype: Literal["bfloat16", "float16", "float32"] = Field(description="What floating-point tensors are stored in")


def outline(source: Checkpoint, settings: Settings) -> Checkpoint:
    """Return the checkpoint as it will be: dtypes changed, in config.json too, by whichever names it has for that."""
    stored = STORED_NAMES[settings.dtype]
    tensors = {name: replace(info, dtype=stored) if _floats(info) else info for name, info in source.tensors.items()}
    # transformers 5 writes "dtype"; it reads "torch_dtype", which earlier ones wrote, as well.
    named = [key for key in ("dtype", "torch_dtype") if key in source.config] or ["dtype"]
    return replace(source, config=source.config | dict.fromkeys(named, settings.dtype), tensors=tensors)


def cast_checkpoint(source: Checkpoint, settings: Settings, output: str | Path, **options: Any) -> Any:
    """Write a copy in another dtype; options and result are those of `mka.transforms.rewrite.rewrite_checkpoint`.

    Raises:
        CheckpointError: if the source is quantized.
        NumericsError: if a value is not finite, or beyond the range of the dtype.
        OutputError: if the folder cannot be written.
    """
    import torch

    dtype = getattr(torch, settings.dtype)

    def treat(info: TensorInfo, rows: "torch.Tensor") -> "torch.Tensor":
        if not _floats(info):
            return rows
        cast = rows.to(dtype)
        if not is_finite(rows):
            raise NumericsError(f"{info.name}: NaN or infinite weights; the source checkpoint is damaged")
        if not is_finite(cast):
            largest = rows.abs().max().item()
            raise NumericsError(
                f"{info.name}: values up to {largest:.4g} do not fit {settings.dtype}, which ends at "
                f"{torch.finfo(dtype).max:.4g}; cast to another dtype"
            )
        return cast

    refuse_quantized(source)
    return rewrite_checkpoint(source, outline(source, settings), treat, output, **options)


def _floats(info: TensorInfo) -> bool:
    return info.dtype.startswith(("F", "BF"))


def _check(source: Checkpoint, settings: Settings) -> None:
    refuse_quantized(source)


def _foresee(source: Checkpoint, settings: Settings) -> int:
    return outline(source, settings).nbytes


def _apply(source: Checkpoint, settings: Settings, evidence: Mapping[str, Any], output: Path, **options: Any) -> Any:
    return cast_checkpoint(source, settings, output, **options)


TRANSFORM = Transform(
    name="cast",
    summary="cast weights",
    check=_check,
    foresee=_foresee,
    apply=_apply,
    settings=Settings,
    outline=outline,
    describe=lambda settings: f"cast to {settings.dtype}",
)
