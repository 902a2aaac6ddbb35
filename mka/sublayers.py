"""The two halves of a decoder layer, run apart: norm, features, and the linear layer that writes to the residual.

``x + post_norm(writer(features(norm(x))))``, for attention and for the MLP; ``post_norm`` only where a family has one.
Features are the heads' outputs (before ``o_proj``) or the inner activations (before ``down_proj``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mka.families import Sublayer


@contextmanager
def _without(layer: torch.nn.Module, path: str) -> Iterator[None]:
    """Put the identity in a module's place for the time of the block."""
    parent, _, name = path.rpartition(".")
    holder = layer.get_submodule(parent)
    module = getattr(holder, name)
    setattr(holder, name, torch.nn.Identity())
    try:
        yield
    finally:
        setattr(holder, name, module)


def read_norm(layer: torch.nn.Module, part: Sublayer, states: torch.Tensor) -> torch.Tensor:
    """Return what the readers of a sublayer see, (S, T, D): the normed residual, gains included."""
    return layer.get_submodule(part.norm)(states)


def read_features(
    layer: torch.nn.Module, part: Sublayer, normed: torch.Tensor, context: dict[str, Any]
) -> torch.Tensor:
    """Return a sublayer's features, (S, T, F).

    Args:
        layer: a decoder layer.
        part: which half.
        normed: of `read_norm`, (S, T, D).
        context: what the decoder hands to a layer (positions, mask); of `mka.decoder.Decoder.enter`.
    """
    with _without(layer, part.writer):
        module = layer.get_submodule(part.module)
        output = module(hidden_states=normed, **context) if part.is_attention else module(normed)
    return output[0] if isinstance(output, tuple) else output


def write_features(layer: torch.nn.Module, part: Sublayer, features: torch.Tensor) -> torch.Tensor:
    """Return what a sublayer adds to the residual, (S, T, D)."""
    added = layer.get_submodule(part.writer)(features)
    return layer.get_submodule(part.post_norm)(added) if part.post_norm else added


def run_sublayer(layer: torch.nn.Module, part: Sublayer, states: torch.Tensor, context: dict[str, Any]) -> torch.Tensor:
    """Return the residual after a sublayer, (S, T, D)."""
    features = read_features(layer, part, read_norm(layer, part, states), context)
    return states + write_features(layer, part, features)
