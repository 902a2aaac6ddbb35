"""The two halves of a decoder layer, run apart: norm, features, and the linear layer that writes to the residual.

``x + post_norm(writer(features(norm(x))))``, for attention and for the MLP; ``post_norm`` only where a family has one.
Features are the heads' outputs (before ``o_proj``) or the inner activations (before ``down_proj``).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from mka.families import Sublayer

BATCH_TOKENS = 4096


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
        context: what the decoder hands to attention (positions, mask); of `catch_contexts`.
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


class _Caught(Exception):
    """Ends a forward pass once what was wanted is in hand."""


@torch.inference_mode()
def catch_contexts(model: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Return what the decoder hands to each layer's attention beside hidden states, for sequences as long as ``ids``.

    One sequence is run; masks and positions broadcast over a batch.

    Args:
        model: a transformers causal language model.
        ids: one sequence, (1, T).
    """
    contexts: list[dict[str, Any]] = []

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        contexts.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    handles = [layer.self_attn.register_forward_pre_hook(catch, with_kwargs=True) for layer in model.model.layers]
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return contexts


@torch.inference_mode()
def embed_windows(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return what enters the first layer, (S, T, D), as the decoder itself makes it of ids (S, T)."""
    caught: list[torch.Tensor] = []

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
            with suppress(_Caught):
                model.model(input_ids=batch, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(caught)
