"""What is done to weights: one file each, checkpoint in, stock folder out, streamed; a table imports it when asked for.

A fold (`mka.transforms.fold`) has no row: it makes no folder of its own, a merge multiplies it in on the way.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mka.model.checkpoint import Checkpoint

# A row per transform: its name, and the module that holds its TRANSFORM.
_TRANSFORMS = {
    "merge": "mka.transforms.merge",
    "rtn": "mka.transforms.rtn",
}
# A row per scheme of a recipe's `quantize`: the transform that rounds, and the bits it leaves of a weight.
_SCHEMES = {
    "int8": ("rtn", 8),
    "int4": ("rtn", 4),
}
BITS = {scheme: bits for scheme, (_, bits) in _SCHEMES.items()}

# Kinds of evidence a quantizer may ask for: the base as (checkpoint, how to load it), and the calibration texts as
# (set, how to read it).
BASE, CALIBRATION = "base", "calibration"


@dataclass(frozen=True)
class Transform:
    """One thing that is done to the weights of a checkpoint.

    Attributes:
        name: as the table spells it.
        summary: what a progress bar says meanwhile.
        check: ``check(checkpoint, settings)`` refuses, before work begins, what cannot be done to this checkpoint.
        foresee: ``foresee(checkpoint, settings)`` returns the bytes of the tensors that will be written.
        apply: ``apply(checkpoint, settings, evidence, output, verify=, on_tensor=)`` writes a stock folder, publishes
            it once ``verify(folder)`` has looked at it, and returns what that found; ``on_tensor`` is told the bytes
            of each tensor written, in sum what ``foresee`` says.
        needs: which kinds of ``evidence`` it cannot do without.
    """

    name: str
    summary: str
    check: Callable[["Checkpoint", Any], None]
    foresee: Callable[["Checkpoint", Any], int]
    apply: Callable[..., Any]
    needs: frozenset[str] = frozenset()


def get_transform(name: str) -> Transform:
    """Return a transform by its name in the table."""
    return importlib.import_module(_TRANSFORMS[name]).TRANSFORM


def get_quantizer(scheme: str) -> Transform:
    """Return the transform of a scheme of a recipe's ``quantize``, other than "off"."""
    return get_transform(_SCHEMES[scheme][0])


def quantizer_needs(scheme: str) -> frozenset[str]:
    """Return which kinds of evidence a scheme of a recipe's ``quantize`` asks for; none if it is "off"."""
    return frozenset() if scheme == "off" else get_quantizer(scheme).needs
