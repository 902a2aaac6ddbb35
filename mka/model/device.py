"""Where models are run: what was chosen for this process, or an accelerator if there is one."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from mka.errors import RecipeError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
# "auto" takes the first CUDA device if there is one, else the processor.
DEVICES = (AUTO, "cpu", "cuda", "mps")

_CHOSEN: ContextVar[str] = ContextVar("device", default=AUTO)


def find_device() -> "torch.device":
    """Return the device that models are run on."""
    import torch

    chosen = _CHOSEN.get()
    if chosen == AUTO:
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(chosen)


@contextmanager
def running_on(name: str) -> Iterator[None]:
    """Run models on a device within the block.

    Args:
        name: one of `DEVICES`.

    Raises:
        RecipeError: if this machine has none, or torch no way to use it.
    """
    import torch

    there = ["cpu"]
    there += ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    if name not in (AUTO, *there):
        raise RecipeError(f"device {name}: torch {torch.__version__} finds none here; there is: {', '.join(there)}")
    token = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def refuse_single(device: "torch.device", what: str) -> None:
    """Refuse a device without numbers of 64 bits.

    Args:
        device: of `find_device`.
        what: needs them.

    Raises:
        RecipeError: if it has none.
    """
    if device.type == "mps":
        raise RecipeError(f"device mps: {what} is summed in 64 bits, which mps has not; run it with --device cpu")
