"""How far a plan has to go: the target in layers, and what cannot be reached. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mka.errors import PlanError, RecipeError
from mka.outside.sizes import format_size


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


@dataclass(frozen=True)
class Bound:
    """What a target allows at most, or asks for at least, of models with some of the layers.

    Attributes:
        name: as the recipe spells it.
        asked: the number in the recipe.
        reach: returns what a model of so many layers has.
        at_most: whether it is bytes, and not above what was asked for; else times as fast, and not below.
        hint: what else would help where it cannot be kept.
    """

    name: str
    asked: float
    reach: Callable[[int], float]
    at_most: bool
    hint: str = ""

    def holds(self, layers: int) -> bool:
        """Whether a model of so many layers keeps it."""
        value = self.reach(layers)
        return value <= self.asked if self.at_most else value >= self.asked

    def refuse(self, layers: int, why: str) -> RecipeError:
        """Return the refusal that names what so many layers have."""
        nearest = self._show(self.reach(layers), math.ceil if self.at_most else math.floor)
        asked = self._show(self.asked, round)
        more = f"; {self.hint}" if self.hint else ""
        return RecipeError(f"{self.name} {asked} cannot be reached: with {layers} layers{why} it is {nearest}{more}")

    def _show(self, value: float, round_off: Callable[[float], int]) -> str:
        """Three decimals, rounded so that what is told is allowed."""
        return format_size(value, round_off) if self.at_most else f"{round_off(value * 1000) / 1000:,.10g}"


def fit_layers(bounds: Sequence[Bound], layers_in: int, fewest: int, layers: int | None = None) -> int:
    """Return the most layers that keep every bound.

    Args:
        bounds: each is easier to keep with fewer layers.
        layers_in: L of the base model.
        fewest: that may remain.
        layers: the number that was asked for outright; None: as many as there may be.

    Raises:
        RecipeError: if none does, naming what is nearest to a bound that is broken.
    """
    for count in [layers] if layers is not None else range(layers_in, fewest - 1, -1):
        if all(bound.holds(count) for bound in bounds):
            return count
    least, why = (layers, "") if layers is not None else (fewest, ", the fewest that protection leaves,")
    raise next(bound.refuse(least, why) for bound in bounds if not bound.holds(least))


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
