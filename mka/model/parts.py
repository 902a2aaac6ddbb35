"""The parts of a decoder layer, run apart: norm, features, and the linear layer that writes to the residual stream.

``x + post_norm(writer(features(norm(x))))``; ``post_norm`` only where a family has one. What features and units are
depends on the kind of part: of attention, the heads' outputs and the groups of heads that share keys and values; of the
MLP, the inner activations and the neurons. A further kind (experts, a recurrence) is a constant here, a branch in
`read_features` and `count_units`, and an entry in the ``TREATS`` of each transform that can treat it.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mka.errors import PlanError

if TYPE_CHECKING:
    import torch

ATTENTION, MLP = "attention", "mlp"


@dataclass(frozen=True)
class Part:
    """One part of a decoder layer: ``x + post_norm(writer(features(norm(x))))``.

    Attributes:
        kind: `ATTENTION` or `MLP`.
        module: its name within the layer.
        norm: the norm it reads through.
        readers: linear layers that read the norm's output.
        writer: linear layer whose output, or what a post-norm makes of it, is added to the residual stream.
        post_norm: norm between the writer and the residual stream, if there is one.
        stacked: parameters that files hold in pieces: name within the layer -> the pieces' names, ``{}`` for a number.
            Row behind row, the pieces of number 0, those of 1 and so on are the parameter, (numbers, rows, columns).
    """

    kind: str
    module: str
    norm: str
    readers: tuple[str, ...]
    writer: str
    post_norm: str | None = None
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @property
    def residual_writer(self) -> str:
        """Module of the layer whose output is added to the residual stream."""
        return self.post_norm or self.writer

    @property
    def linear(self) -> tuple[str, ...]:
        """Its linear layers."""
        return (*self.readers, self.writer)

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """Its linear layers by what engines make one product of: those that read the norm, and the writer."""
        return self.readers, (self.writer,)

    def owns(self, suffix: str) -> bool:
        """Whether a tensor of the layer, e.g. ``"mlp.up_proj.weight"``, belongs to this part."""
        names = (self.module, self.norm, *((self.post_norm,) if self.post_norm else ()))
        return suffix.startswith(tuple(f"{name}." for name in names))


def check_parts(parts: Collection[Part], treats: Collection[str], transform: str, where: str) -> None:
    """Refuse layers with parts of a kind that a transform cannot treat.

    Args:
        parts: of the layers.
        treats: kinds the transform can treat.
        transform: what it does, e.g. ``"merging"``.
        where: what the layers are of.

    Raises:
        PlanError: naming the kinds.
    """
    others = [part.kind for part in parts if part.kind not in treats]
    if others:
        raise PlanError(f"{where}: {transform} cannot treat {', '.join(others)}; allowed: {', '.join(sorted(treats))}")


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


def read_norm(layer: "torch.nn.Module", part: Part, states: "torch.Tensor") -> "torch.Tensor":
    """Return what the readers of a part see, (S, T, D): the normed residual, gains included."""
    return layer.get_submodule(part.norm)(states)


def read_features(
    layer: "torch.nn.Module", part: Part, normed: "torch.Tensor", context: dict[str, Any]
) -> "torch.Tensor":
    """Return a part's features, (S, T, F).

    Args:
        layer: a decoder layer.
        part: which part.
        normed: of `read_norm`, (S, T, D).
        context: what the decoder hands to a layer (positions, mask); of `mka.model.decoder.Decoder.enter`.
    """
    with _without(layer, part.writer):
        module = layer.get_submodule(part.module)
        output = module(hidden_states=normed, **context) if part.kind == ATTENTION else module(normed)
    return output[0] if isinstance(output, tuple) else output


def write_features(layer: "torch.nn.Module", part: Part, features: "torch.Tensor") -> "torch.Tensor":
    """Return what a part adds to the residual, (S, T, D)."""
    added = layer.get_submodule(part.writer)(features)
    return layer.get_submodule(part.post_norm)(added) if part.post_norm else added


def run_part(layer: "torch.nn.Module", part: Part, states: "torch.Tensor", context: dict[str, Any]) -> "torch.Tensor":
    """Return the residual after a part, (S, T, D)."""
    features = read_features(layer, part, read_norm(layer, part, states), context)
    return states + write_features(layer, part, features)


def count_units(layer: "torch.nn.Module", part: Part) -> int:
    """Return the number of units of a part.

    Raises:
        PlanError: if its heads pass a norm of their own, whose gains one layer has but once.
    """
    if part.kind == MLP:
        return int(layer.get_submodule(part.writer).in_features)
    attention: Any = layer.get_submodule(part.module)
    if hasattr(attention, "q_norm"):
        raise PlanError("heads of several layers cannot share one layer in a family with q/k norms; take one layer's")
    return int(attention.config.num_key_value_heads)


def reader_sections(layer: "torch.nn.Module", part: Part, name: str) -> list[int]:
    """Return the row counts of what a reader stacks: one entry, or those of a fused q/k/v or gate/up layer."""
    rows = int(layer.get_submodule(name).out_features)
    features = int(layer.get_submodule(part.writer).in_features)
    if name.endswith("qkv_proj"):
        return [features, (rows - features) // 2, (rows - features) // 2]
    if name.endswith("gate_up_proj"):
        return [features, features]
    return [rows]
