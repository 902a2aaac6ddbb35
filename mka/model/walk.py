"""Texts on their way through a decoder's layers: whoever runs a model layer by layer moves them along.

Layer by layer: ``with decoder.hold(index): batch.states = batch.run(decoder.layers[index], index)`` for every batch. Of
layers that a plan makes, `mka.evidence.walk` does it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mka.model.decoder import Decoder
from mka.texts.tokens import batch_by_length


@dataclass
class Batch:
    """Texts of like length on their way through the layers.

    Attributes:
        rows: which texts, (S,).
        mask: 1 for real tokens, (S, T).
        states: hidden states before the next layer, (S, T, D).
        contexts: what each layer of the base is given beside them.
    """

    rows: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor
    contexts: list[dict[str, Any]]

    def run(self, layer: Any, index: int) -> torch.Tensor:
        """Return the states behind a layer, (S, T, D).

        Args:
            layer: a decoder layer that is held.
            index: the layer of the base whose place in the decoder it has: positions and mask are those given there.
        """
        return run_layer(layer, self.states, self.contexts[index])


def run_layer(layer: Any, states: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """Return the states behind a layer, (S, T, D), given what the decoder hands to it beside those in front."""
    output = layer(states, **context)
    return output[0] if isinstance(output, tuple) else output


def own_context(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Copy what a decoder hands to its layers: tensors that inference mode made cannot be kept for a gradient.

    Args:
        value: of `mka.model.decoder.Decoder.enter`, nested.
        dtype: of floating tensors; None: as they are.
    """
    if isinstance(value, torch.Tensor):
        return (value if dtype is None or not value.is_floating_point() else value.to(dtype)).clone()
    if isinstance(value, dict):
        return {key: own_context(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(own_context(item, dtype) for item in value)
    return value


def enter_texts(decoder: Decoder, sequences: Sequence[Sequence[int]], batch_size: int) -> list[Batch]:
    """Return texts as they enter the first layer, the longest first.

    Args:
        decoder: the base.
        sequences: token ids of N texts.
        batch_size: texts per batch; texts of like length share one, so that little is padded.
    """
    return [
        Batch(torch.tensor(rows, device=decoder.device), mask, *decoder.enter(ids, mask))
        for rows, ids, mask in batch_by_length(sequences, batch_size, decoder.device)
    ]
