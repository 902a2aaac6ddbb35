"""The units of a part of a layer: MLP neurons, or groups of attention heads that share keys and values.

Units add up and have no order, so those of several layers may stand side by side, and any of them may be left out.
"""

from collections.abc import Sequence

import torch


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
