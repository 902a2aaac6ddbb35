"""Texts walked through planned layers, one layer in memory at a time: what every kind of evidence is made of."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mka.model.decoder import Decoder, put_tensor
from mka.model.walk import Batch
from mka.plan.plan import MergedLayer
from mka.transforms.verbs import make_tensor


@torch.inference_mode()
def walk_layers(
    decoder: Decoder,
    layers: Sequence[MergedLayer],
    batches: Sequence[Batch],
    on_layer: Callable[[int], Any] | None = None,
) -> Iterator[tuple[int, Batch, torch.Tensor]]:
    """Walk all batches through output layers, layer by layer; the head is not run.

    Memory is one output layer with the base layers it is made of, and the hidden states of all tokens.

    Args:
        decoder: the base.
        layers: of a plan, or those that make the base.
        batches: before the first of the layers; their states move along.
        on_layer: called with the number of tokens that have passed a layer.

    Yields:
        Whenever a batch leaves a layer: the layer's position, the batch, and the states it entered with, (S, T, D).
    """
    tokens = sum(int(batch.mask.sum()) for batch in batches) if on_layer else 0
    for position, layer in enumerate(layers):
        with hold_layer(decoder, layer) as module:
            for batch in batches:
                before = batch.states
                batch.states = batch.run(module, layer.leader)
                yield position, batch, before
        if on_layer:
            on_layer(tokens)


@contextmanager
def hold_layer(decoder: Decoder, layer: MergedLayer) -> Iterator[torch.nn.Module]:
    """Have an output layer in memory within the block: a layer of the base, or one made of several.

    The arithmetic is `mka.transforms.verbs.make_tensor`, the same that writes checkpoints.
    """
    with decoder.hold(*layer.used):
        yield decoder.layers[layer.leader] if layer.is_copy else _make_layer(decoder, layer)


def _make_layer(decoder: Decoder, layer: MergedLayer) -> torch.nn.Module:
    """Make a layer of the kind of the one that leads it; the layers used must be held, and tensors may be theirs."""
    leader = decoder.layers[layer.leader]
    # What the memo holds is not copied: every parameter is replaced below.
    made = copy.deepcopy(leader, {id(value): value for value in leader.parameters()})
    state = {index: dict(decoder.layers[index].named_parameters()) for index in layer.used}
    for name, _ in leader.named_parameters():
        put_tensor(made, name, make_tensor(layer, name, decoder.family, lambda i, suffix: state[i][suffix]))
    return made
