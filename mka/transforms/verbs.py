"""What the verbs of a plan make of one tensor: ``combine`` sums layers, ``take`` chooses among them.

The arithmetic of every model that is planned, written (`mka.transforms.merge`) or walked (`mka.evidence.walk`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mka.errors import PlanError
from mka.model.families import Family
from mka.model.parts import ATTENTION, MLP, check_parts
from mka.plan.plan import MergedLayer

if TYPE_CHECKING:
    import torch

# Kinds of parts of which those of several layers can be summed.
SUMMED = frozenset({ATTENTION, MLP})

ReadSource = Callable[[int, str], "torch.Tensor"]


def check_summable(family: Family) -> None:
    """Refuse to sum layers of a family.

    Raises:
        PlanError: naming the kinds of parts that have no meaningful sum: expert 3 of one layer is not that of another.
    """
    check_parts(family.parts, SUMMED, "a weighted sum of layers", family.model_type)


def refuse_selecting(layer: MergedLayer) -> None:
    """Refuse an output layer that only an alignment can make.

    Raises:
        PlanError: if heads or neurons of several layers compete.
    """
    if layer.selects:
        raise PlanError(
            f"layers {list(layer.sources)}: which heads and neurons stay is decided by an alignment; "
            f"merge this plan with alignment enabled"
        )


def make_tensor(layer: MergedLayer, suffix: str, family: Family, read: ReadSource) -> "torch.Tensor":
    """Make one tensor of an output layer as its verb says.

    Args:
        layer: of a plan.
        suffix: tensor name within a layer, e.g. ``"mlp.up_proj.weight"``.
        family: of the model.
        read: ``read(source layer, suffix) -> tensor``.

    Returns:
        The tensor in its own dtype; untouched bytes where one layer is the source.

    Raises:
        PlanError: if heads or neurons of several layers compete, which only an alignment can decide.
    """
    if layer.verb == "combine":
        return combine_layers(layer, suffix, family, read)
    refuse_selecting(layer)
    return read(layer.attention[0] if family.attention.owns(suffix) else layer.mlp[0], suffix)


def combine_layers(layer: MergedLayer, suffix: str, family: Family, read: ReadSource) -> "torch.Tensor":
    """Compute one tensor of a layer that is a sum of layers.

    Args:
        layer: source layers and weights.
        suffix: tensor name within a layer, e.g. ``"mlp.up_proj.weight"``.
        family: tells which norm gains are folded into which linear layers.
        read: ``read(source layer, suffix) -> tensor``.

    Returns:
        The tensor in its own dtype: untouched bytes for a copy, else a float32 weighted sum cast back.

    Raises:
        PlanError: if several layers are to be summed that have parts without a meaningful sum.
    """
    import torch

    active = [(i, w) for i, w in zip(layer.sources, layer.weights) if w != 0.0]
    if len(active) == 1 and active[0][1] == 1.0:
        return read(active[0][0], suffix)
    check_summable(family)
    module, _, kind = suffix.rpartition(".")
    read_by = family.folds if kind == "weight" else {}
    if module in read_by:
        # Its gains are in what reads it.
        return torch.full_like(read(active[0][0], suffix), 1.0 - family.gain_offset)
    norm = next((norm for norm, readers in read_by.items() if module in readers), None)

    def fold_gain(value: "torch.Tensor", index: int) -> "torch.Tensor":
        value = value.to(torch.float32, copy=True)
        if norm is not None:
            gain = read(index, f"{norm}.weight").to(torch.float32) + family.gain_offset
            value.mul_(gain)  # (out, in) * (in,)
        return value

    (first, weight), *others = active
    total = read(first, suffix)
    dtype, total = total.dtype, fold_gain(total, first).mul_(weight)
    for index, weight in others:
        total.add_(fold_gain(read(index, suffix), index), alpha=weight)
    return total.to(dtype)
