"""Hidden states of every layer in one walk, pooled as they appear."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from mka.evidence.states import HiddenStates
from mka.evidence.walk import walk_layers
from mka.model.decoder import as_decoder
from mka.model.walk import Batch, enter_texts
from mka.plan.plan import MergedLayer, identity_layers


@torch.inference_mode()
def observe_tokens(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    layers: Sequence[MergedLayer] | None = None,
    pooling: Literal["last", "mean"] = "last",
    batch_size: int = 16,
    on_layer: Callable[[int], Any] | None = None,
) -> HiddenStates:
    """Walk all sequences through the layers, each layer run once and pooled as it ends; the head is not run.

    Args:
        model: a transformers causal language model, or a `mka.model.decoder.Decoder`: one layer is held at a time.
        sequences: token ids of N texts.
        layers: output layers of a plan, whose L layers are observed in place of the base's; None for the base.
        pooling: "last" real token, or "mean" over real tokens.
        batch_size: texts per pass; texts of like length share a batch, so that little is padded.
        on_layer: called with the number of tokens that have passed a layer.

    Returns:
        `HiddenStates` with pooled (L+1, N, D). Memory is that array, one layer, and the hidden states of all tokens.

    Raises:
        NumericsError: if hidden states are not finite.
    """
    decoder = as_decoder(model)
    layers = identity_layers(len(decoder.layers)) if layers is None else layers
    device, count = decoder.device, len(layers)
    # Both stay on the device: reading a number back would make it wait after every batch.
    pooled = torch.empty((count + 1, len(sequences), decoder.model.config.hidden_size), device=device)
    cosine_sum = torch.zeros(count, dtype=torch.float64, device=device)
    batches = enter_texts(decoder, sequences, batch_size)
    for batch in batches:
        pooled[0, batch.rows] = _pool(batch, pooling)
    for index, batch, before in walk_layers(decoder, layers, batches, on_layer):
        pooled[index + 1, batch.rows] = _pool(batch, pooling)
        cosine = torch.nn.functional.cosine_similarity(before.float(), batch.states.float(), dim=-1)
        cosine_sum[index] += (cosine * batch.mask).sum(dtype=torch.float64)
    tokens = np.array([len(s) for s in sequences], dtype=np.int64)
    return HiddenStates(pooled.cpu().numpy(), 1.0 - cosine_sum.cpu().numpy() / tokens.sum(), tokens)


def _pool(batch: Batch, pooling: str) -> torch.Tensor:
    """Return one vector per text, (S, D) float32."""
    if pooling == "last":
        last = batch.mask.sum(dim=1) - 1
        return batch.states[torch.arange(len(last), device=last.device), last].float()
    weights = batch.mask.unsqueeze(-1).float()
    return (batch.states.float() * weights).sum(dim=1) / weights.sum(dim=1)
