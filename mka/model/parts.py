"""The two halves of a decoder layer, run apart: norm, features, and the linear layer that writes to the residual.

``x + post_norm(writer(features(norm(x))))``, for attention and for the MLP; ``post_norm`` only where a family has one.
Features are the heads' outputs (before ``o_proj``) or the inner activations (before ``down_proj``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mka.errors import PlanError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sublayer:
    """Half of a decoder layer: ``x + post_norm(writer(features(norm(x))))``.

    Attributes:
        module: ``"self_attn"`` or ``"mlp"``.
        norm: the norm it reads through.
        readers: linear layers that read the norm's output.
        writer: linear layer that writes to the residual stream.
        post_norm: norm between the writer and the residual stream, if there is one.
    """

    module: str
    norm: str
    readers: tuple[str, ...]
    writer: str
    post_norm: str | None = None

    @property
    def is_attention(self) -> bool:
        """Whether it mixes positions."""
        return self.module == "self_attn"

    def owns(self, suffix: str) -> bool:
        """Whether a tensor of the layer, e.g. ``"mlp.up_proj.weight"``, belongs to this half."""
        names = (self.module, self.norm, *((self.post_norm,) if self.post_norm else ()))
        return suffix.startswith(tuple(f"{name}." for name in names))


@contextmanager
def _without(layer: "torch.nn.Module", path: str) -> Iterator[None]:
    """Put the identity in a module's place for the time of the block."""
    import torch

    parent, _, name = path.rpartition(".")
    holder = layer.get_submodule(parent)
    module = getattr(holder, name)
    setattr(holder, name, torch.nn.Identity())
    try:
        yield
    finally:
        setattr(holder, name, module)


def read_norm(layer: "torch.nn.Module", part: Sublayer, states: "torch.Tensor") -> "torch.Tensor":
    """Return what the readers of a sublayer see, (S, T, D): the normed residual, gains included."""
    return layer.get_submodule(part.norm)(states)


def read_features(
    layer: "torch.nn.Module", part: Sublayer, normed: "torch.Tensor", context: dict[str, Any]
) -> "torch.Tensor":
    """Return a sublayer's features, (S, T, F).

    Args:
        layer: a decoder layer.
        part: which half.
        normed: of `read_norm`, (S, T, D).
        context: what the decoder hands to a layer (positions, mask); of `mka.model.decoder.Decoder.enter`.
    """
    with _without(layer, part.writer):
        module = layer.get_submodule(part.module)
        output = module(hidden_states=normed, **context) if part.is_attention else module(normed)
    return output[0] if isinstance(output, tuple) else output


def write_features(layer: "torch.nn.Module", part: Sublayer, features: "torch.Tensor") -> "torch.Tensor":
    """Return what a sublayer adds to the residual, (S, T, D)."""
    added = layer.get_submodule(part.writer)(features)
    return layer.get_submodule(part.post_norm)(added) if part.post_norm else added


def run_sublayer(
    layer: "torch.nn.Module", part: Sublayer, states: "torch.Tensor", context: dict[str, Any]
) -> "torch.Tensor":
    """Return the residual after a sublayer, (S, T, D)."""
    features = read_features(layer, part, read_norm(layer, part, states), context)
    return states + write_features(layer, part, features)


def count_units(layer: "torch.nn.Module", part: Sublayer) -> int:
    """Return the number of units of a sublayer.

    Raises:
        PlanError: if its heads pass a norm of their own, whose gains one layer has but once.
    """
    if not part.is_attention:
        return int(layer.get_submodule(part.writer).in_features)
    attention: Any = layer.get_submodule(part.module)
    if hasattr(attention, "q_norm"):
        raise PlanError("heads of several layers cannot share one layer in a family with q/k norms; take one layer's")
    return int(attention.config.num_key_value_heads)


def reader_sections(layer: "torch.nn.Module", part: Sublayer, name: str) -> list[int]:
    """Return the row counts of what a reader stacks: one entry, or those of a fused q/k/v or gate/up layer."""
    rows = int(layer.get_submodule(name).out_features)
    features = int(layer.get_submodule(part.writer).in_features)
    if name.endswith("qkv_proj"):
        return [features, (rows - features) // 2, (rows - features) // 2]
    if name.endswith("gate_up_proj"):
        return [features, features]
    return [rows]
