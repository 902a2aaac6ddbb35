"""The stage that rounds."""

from pathlib import Path
from typing import Any

from mka.model.checkpoint import Checkpoint
from mka.model.verification import _verify
from mka.recipe import QuantizeSettings
from mka.terminal import show_progress
from mka.transforms.rtn import quantize_checkpoint


def write_quantized(checkpoint: Checkpoint, settings: QuantizeSettings, output: Path) -> dict[str, Any]:
    """Quantize, verify with a stranger's loader, publish; returns what the loader found.

    Raises:
        RecipeError: if the group size does not fit.
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    linear = sum(len(t.shape) == 2 for i in range(checkpoint.layers) for t in checkpoint.layer_tensors(i).values())
    with show_progress("round weights", linear, "matrix") as advance:
        return quantize_checkpoint(checkpoint, output, settings, verify=_verify, on_module=advance)
