"""A healed model written as a stock folder, one layer in memory at a time."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.model.checkpoint import Checkpoint
from mka.plan.plan import MergePlan, identity_layers
from mka.transforms.merge import merge_checkpoint
from mka.transforms.rewrite import refuse_quantized

if TYPE_CHECKING:
    import torch


def write_healed(
    source: Checkpoint,
    layers: Iterable[Mapping[str, "torch.Tensor"]],
    output: str | Path,
    *,
    verify: Callable[[Path], Any] | None = None,
    on_tensor: Callable[[int], Any] | None = None,
) -> Any:
    """Write a copy of a checkpoint in which some tensors of its layers are others; publish it only once it is whole.

    It is a merge that keeps every layer, refitted.

    Args:
        source: what was healed.
        layers: of each of its layers in order, the tensors that changed, by name within the layer; stored in the
            source's dtypes. Asked for when they are written.
        output: folder to publish; must not exist.
        verify: called with the finished folder before it is published; an exception from it publishes nothing.
        on_tensor: called with the bytes of each tensor written (for a progress bar).

    Returns:
        What ``verify`` returned.

    Raises:
        CheckpointError: if the source is quantized.
        PlanError: if its layers have parts that are not understood.
        NumericsError: if a tensor is not finite in the source's dtype.
        OutputError: if the folder cannot be written.
    """
    refuse_quantized(source)
    plan = MergePlan("heal", "", source.layers, identity_layers(source.layers))
    return merge_checkpoint(plan, source, output, aligned=iter(layers), verify=verify, on_tensor=on_tensor)
