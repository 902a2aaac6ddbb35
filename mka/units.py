"""The units of a sublayer: MLP neurons, or groups of attention heads that share keys and values.

Units add up and have no order, so those of several layers may stand side by side, and any of them may be left out.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mka.errors import PlanError
from mka.families import Sublayer


def count_units(layer: torch.nn.Module, part: Sublayer) -> int:
    """Return the number of units of a sublayer.

    Raises:
        PlanError: if its heads pass a norm of their own, whose gains one layer has but once.
    """
    if not part.is_attention:
        return int(layer.get_submodule(part.writer).in_features)
    attention: Any = layer.get_submodule(part.module)
    if hasattr(attention, "q_norm"):
        raise PlanError("heads of several layers cannot share one layer in a family with q/k norms; take one layer's")
    return int(attention.config.num_key_value_heads)


def reader_sections(layer: torch.nn.Module, part: Sublayer, name: str) -> list[int]:
    """Return the row counts of what a reader stacks: one entry, or those of a fused q/k/v or gate/up layer."""
    rows = int(layer.get_submodule(name).out_features)
    features = int(layer.get_submodule(part.writer).in_features)
    if name.endswith("qkv_proj"):
        return [features, (rows - features) // 2, (rows - features) // 2]
    if name.endswith("gate_up_proj"):
        return [features, features]
    return [rows]


def unit_rows(size: int, units: int, chosen: torch.Tensor) -> torch.Tensor:
    """Return the rows of chosen units in a section of ``size`` rows that holds ``units`` of them, unit by unit."""
    width = size // units
    return (chosen[:, None] * width + torch.arange(width, device=chosen.device)).flatten()


def gather_units(
    tensors: Sequence[torch.Tensor], sections: Sequence[int], units: int, picks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Build a reader's weight or bias from the chosen units of several layers.

    Args:
        tensors: the same tensor of each layer, (rows, ...).
        sections: of `reader_sections`.
        units: units per layer.
        picks: units chosen of each layer.

    Returns:
        Section by section, the chosen rows of the first layer, the second and so on.
    """
    parts = []
    offset = 0
    for size in sections:
        parts += [t[offset + unit_rows(size, units, pick)] for t, pick in zip(tensors, picks)]
        offset += size
    return torch.cat(parts)
