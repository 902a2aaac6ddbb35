"""How far a plan has to go: the target in layers, and what cannot be reached. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mka.errors import PlanError, RecipeError


@dataclass(frozen=True)
class Aim:
    """What a plan has to reach: remaining layers, and how many stay untouched at either end."""

    layers_out: int
    protect_first: int = 0
    protect_last: int = 0


def resolve_target(
    layers_in: int,
    layer_bytes: Sequence[int],
    total_bytes: int,
    *,
    layers: int | None = None,
    layer_ratio: float | None = None,
    size_ratio: float | None = None,
) -> int:
    """Turn a target into a number of remaining layers.

    A layer ratio is rounded to the nearest layer; a size ratio keeps as many layers as still save at least
    that share of the bytes, counting the average layer.

    Args:
        layers_in: L of the base model.
        layer_bytes: bytes per layer, (L,).
        total_bytes: bytes of the whole checkpoint.
        layers: remaining layers, given directly.
        layer_ratio: ``1 - layers out / layers in``.
        size_ratio: ``1 - bytes out / bytes in``.

    Raises:
        RecipeError: if the target is below 1, above ``layers_in``, or cannot be reached by removing layers.
    """
    if layers is not None:
        if not 1 <= layers <= layers_in:
            raise RecipeError(f"target of {layers} layers: the model has {layers_in}; allowed: 1 to {layers_in}")
        return layers
    if layer_ratio is not None:
        return max(1, round(layers_in * (1.0 - layer_ratio)))
    if size_ratio is None:
        raise RecipeError("target: one of layers, layer_ratio, size_ratio must be given")
    average = sum(layer_bytes) / layers_in
    removed = int(np.ceil(size_ratio * total_bytes / average - 1e-9))
    if removed > layers_in - 1:
        most = (layers_in - 1) * average / total_bytes
        raise RecipeError(
            f"target size_ratio {size_ratio}: the layers hold {sum(layer_bytes) / total_bytes:.0%} of the bytes and "
            f"one must remain; at most {most:.3f} can be reached by depth alone"
        )
    return layers_in - removed


def refuse_unreachable(layers_out: int, reached: int, protect_first: int, protect_last: int) -> None:
    """Refuse a target below what can be reached.

    Args:
        layers_out: layers wanted.
        reached: fewest layers that protection and kinds allow.
        protect_first: layers at the start left alone.
        protect_last: layers at the end left alone.

    Raises:
        PlanError: if ``reached`` is above ``layers_out``.
    """
    if reached > layers_out:
        raise PlanError(
            f"target of {layers_out} layers cannot be reached: no mergeable pair is left at {reached} layers with the "
            f"first {protect_first} and last {protect_last} protected; protect fewer layers or aim higher"
        )
