"""Stock's class of a config without its weights, and which stored tensors make its parameters."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from mka.errors import CheckpointError
from mka.model.checkpoint import Checkpoint
from mka.model.config import build_config


def build_outline(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build stock's class from a config, its parameters without values.

    Raises:
        CheckpointError: if transformers refuses the config.
    """
    from transformers import AutoModelForCausalLM

    config = build_config(checkpoint.config, checkpoint.path)
    try:
        with _without_values():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint.path}: config.json is refused: {reason}") from None
    return model.eval()


def find_pieces(checkpoint: Checkpoint, model: Any) -> dict[str, tuple[str, ...]]:
    """Return the stored tensors that make each parameter; refuse weights that are not the config's, as loaders do.

    Args:
        checkpoint: unquantized.
        model: of `build_outline`.

    Raises:
        CheckpointError: if a weight is missing, left over or of another shape than the config says.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if model.config.tie_word_embeddings:
        found.pop(checkpoint.family.head_tensor, None)
    pieces = {
        name: (name,) if name in found else checkpoint.family.stored_pieces(name, shape[0])
        for name, shape in shapes.items()
    }
    wanted = {piece for names in pieces.values() for piece in names}
    _refuse(checkpoint, "missing", wanted - found.keys())
    _refuse(checkpoint, "unexpected", found.keys() - wanted)
    fits = {name: _fits([found[piece] for piece in pieces[name]], shape) for name, shape in shapes.items()}
    _refuse(checkpoint, "mismatched", [name for name, fit in fits.items() if not fit])
    return pieces


def _fits(pieces: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes, row behind row, make one of that shape."""
    if len(pieces) == 1:
        return pieces[0] == shape
    return sum(map(math.prod, pieces)) == math.prod(shape) and {piece[1:] for piece in pieces} == {shape[2:]}


def _refuse(checkpoint: Checkpoint, kind: str, names: Sequence[str] | set[str]) -> None:
    if names:
        first = sorted(names)[0]
        what = "fetch or write the model again"
        if kind == "unexpected" and checkpoint.family.split_tensor(first) is None:
            what = "stock loading leaves them out, and they would be lost; take them out to go on without them"
        raise CheckpointError(
            f"{checkpoint.path}: config and weights disagree: {len(names)} {kind} keys, e.g. {first}; {what}"
        )


@contextmanager
def _without_values() -> Iterator[None]:
    """Parameters made within the block have a shape only; buffers, which no checkpoint holds, have their values.

    By torch's own hook: accelerate's `init_empty_weights` does the same, and would be a package more on a GPU machine.
    """

    def make_empty(module: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        return None if value is None else torch.nn.Parameter(value.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(make_empty)
    try:
        yield
    finally:
        hook.remove()
