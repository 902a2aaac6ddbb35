"""HIGGS: groups of weights turned by a random Hadamard matrix, which makes normal numbers of them, and rounded as such.

Source: Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", arXiv
2411.17525: no calibration text is looked at, and the relative squared error of every matrix is that of the grid, known
beforehand. Such grids have no format that stock loading reads on a CPU. So what is written is a simulation: rounded
values turned back, stored in the dtype they had, in as many bytes as before.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from mka.errors import RecipeError
from mka.model.checkpoint import Checkpoint
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.model.tensors import TensorInfo
from mka.recipe import LEAST_GROUP
from mka.sections import Section
from mka.transforms import Transform
from mka.transforms.packing import find_linear
from mka.transforms.rewrite import refuse_quantized, rewrite_checkpoint
from mka.transforms.serving import list_group_sizes

if TYPE_CHECKING:
    import torch

# Turned numbers that are compared with all points of a grid at a time.
CHUNK = 1 << 18


class Settings(Section):
    """Settings of HIGGS."""

    bits: int = Field(4, ge=1, le=4, description="Bits of a weight, beside one scale of 16 bits per group")
    group_size: int = Field(256, ge=LEAST_GROUP, description="Weights that are turned together; a power of two")
    pairs: bool = Field(True, description="Round pairs of numbers to points of the plane; else each number by itself")
    seed: int = Field(0, ge=0, description="Draws the signs that groups are turned with")

    @field_validator("group_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("a Hadamard matrix has a power of two for its size")
        return value


def simulate_higgs(source: Checkpoint, settings: Settings, output: str | Path, **options: Any) -> Any:
    """Write a copy with rounded linear layers; options and result are those of `rewrite_checkpoint`.

    Raises:
        CheckpointError: if the source is quantized.
        RecipeError: if the group size does not divide the widths.
        OutputError: if the folder cannot be written.
    """
    _check(source, settings)
    linear = {info.name for info in find_linear(source)}

    def treat(info: TensorInfo, rows: "torch.Tensor") -> "torch.Tensor":
        return round_turned(rows, settings, info.name) if info.name in linear else rows

    return rewrite_checkpoint(source, source, treat, output, **options)


def round_turned(weight: "torch.Tensor", settings: Settings, name: str) -> "torch.Tensor":
    """Return weights turned, rounded to the grid and turned back, in their dtype.

    Args:
        weight: (R, F).
        settings: bits, groups, whether pairs are rounded.
        name: of the matrix; with the seed it draws the signs.
    """
    import torch
    from scipy.linalg import hadamard

    from mka.transforms.grids import fit_pairs, fit_scalars

    size = settings.group_size
    turn = torch.from_numpy(hadamard(size).astype("float32")) / size**0.5  # (G, G), its own transpose and inverse
    drawn = int.from_bytes(hashlib.sha256(f"{settings.seed} {name}".encode()).digest()[:6])
    signs = torch.randint(0, 2, (weight.shape[1],), generator=torch.Generator().manual_seed(drawn)) * 2.0 - 1.0
    turned = (weight.float() * signs).unflatten(-1, (-1, size)) @ turn  # (R, F / G, G)
    # A group's numbers have the square mean of its weights.
    scale = turned.square().mean(-1, keepdim=True).sqrt().half().float()
    found = fit_pairs(settings.bits) if settings.pairs else fit_scalars(settings.bits)[:, None]
    points = torch.from_numpy(found).float()  # (n, p)
    numbers = (turned / scale.where(scale > 0, 1.0)).reshape(-1, points.shape[1])  # (R F / p, p)
    nearest = torch.cat([points[torch.cdist(part, points).argmin(-1)] for part in numbers.split(CHUNK)])
    rounded = (nearest.reshape(turned.shape) * scale) @ turn
    return (rounded.flatten(-2) * signs).to(weight.dtype)


def _check(source: Checkpoint, settings: Settings) -> None:
    refuse_quantized(source)
    check_parts(source.family.parts, frozenset({ATTENTION, MLP}), "transforms: higgs", str(source.path))
    widths = sorted({info.shape[1] for info in find_linear(source)})
    if any(width % settings.group_size for width in widths):
        fitting = [size for size in list_group_sizes(widths) if size.bit_count() == 1]
        raise RecipeError(
            f"transforms: higgs: group_size {settings.group_size} does not divide the layer widths {widths}; "
            f"sizes that do: {', '.join(map(str, fitting)) or f'none of {LEAST_GROUP} or more'}"
        )


def _apply(source: Checkpoint, settings: Settings, evidence: Mapping[str, Any], output: Path, **options: Any) -> Any:
    return simulate_higgs(source, settings, output, **options)


def _describe(settings: Settings) -> str:
    what = "pairs" if settings.pairs else "numbers"
    how = f"{settings.bits} bits in groups of {settings.group_size}, {what} rounded"
    return f"HIGGS, {how} (simulated: stored in floating point)"


TRANSFORM = Transform(
    name="higgs",
    summary="round turned weights",
    check=_check,
    foresee=lambda source, settings: source.nbytes,
    apply=_apply,
    settings=Settings,
    describe=_describe,
)
