"""The stage that rounds."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mka.errors import RecipeError
from mka.model.checkpoint import Checkpoint
from mka.model.verification import _verify
from mka.recipe import QuantizeSettings
from mka.terminal import show_progress
from mka.transforms import get_quantizer


def write_quantized(
    checkpoint: Checkpoint,
    settings: QuantizeSettings,
    output: Path,
    evidence: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Quantize, verify with a stranger's loader, publish; returns what the loader found.

    Args:
        checkpoint: unquantized.
        settings: scheme (not "off") and group size.
        output: folder to publish.
        evidence: kind -> what the scheme's transform asks for.

    Raises:
        RecipeError: if the group size does not fit, or evidence is missing.
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    transform = get_quantizer(settings.scheme)
    if missing := sorted(transform.needs - evidence.keys()):
        raise RecipeError(
            f"quantize.scheme {settings.scheme}: {transform.name} looks at {', '.join(missing)}; none given"
        )
    transform.check(checkpoint, settings)
    with show_progress(transform.summary, transform.foresee(checkpoint, settings), "B", scale=True) as advance:
        return transform.apply(checkpoint, settings, evidence, output, verify=_verify, on_tensor=advance)
