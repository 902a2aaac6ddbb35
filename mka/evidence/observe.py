"""Hidden states of every layer in one walk, pooled as they appear."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from mka.evidence.states import HiddenStates
from mka.model.decoder import as_decoder
from mka.texts.tokens import batch_by_length, tokenize


@dataclass
class _Batch:
    """Texts of like length on their way through the layers.

    Attributes:
        rows: which texts, (S,).
        mask: 1 for real tokens, (S, T).
        states: hidden states before the next layer, (S, T, D).
        contexts: what each layer is given beside them.
    """

    rows: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor
    contexts: list[dict[str, Any]]

    def pool(self, pooling: str) -> torch.Tensor:
        """Return one vector per text, (S, D) float32."""
        if pooling == "last":
            last = self.mask.sum(dim=1) - 1
            return self.states[torch.arange(len(last), device=last.device), last].float()
        weights = self.mask.unsqueeze(-1).float()
        return (self.states.float() * weights).sum(dim=1) / weights.sum(dim=1)


def observe(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int,
    pooling: Literal["last", "mean"] = "last",
    batch_size: int = 16,
    on_layer: Callable[[int], Any] | None = None,
) -> HiddenStates:
    """Observe all layers on texts cut to ``max_tokens`` tokens; see `observe_tokens` for the rest.

    Raises:
        CalibrationError: if a text has no tokens.
        NumericsError: if hidden states are not finite.
    """
    sequences = tokenize(tokenizer, texts, max_tokens)
    return observe_tokens(model, sequences, pooling=pooling, batch_size=batch_size, on_layer=on_layer)


@torch.inference_mode()
def observe_tokens(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    pooling: Literal["last", "mean"] = "last",
    batch_size: int = 16,
    on_layer: Callable[[int], Any] | None = None,
) -> HiddenStates:
    """Walk all sequences through the layers, each layer run once and pooled as it ends; the head is not run.

    Args:
        model: a transformers causal language model, or a `mka.model.decoder.Decoder`: one layer is held at a time.
        sequences: token ids of N texts.
        pooling: "last" real token, or "mean" over real tokens.
        batch_size: texts per pass; texts of like length share a batch, so that little is padded.
        on_layer: called with the number of tokens that have passed a layer.

    Returns:
        `HiddenStates` with pooled (L+1, N, D). Memory is that array, one layer, and the hidden states of all tokens.

    Raises:
        NumericsError: if hidden states are not finite.
    """
    decoder = as_decoder(model)
    device, count = decoder.device, len(decoder.layers)
    # Both stay on the device: reading a number back would make it wait after every batch.
    pooled = torch.empty((count + 1, len(sequences), decoder.model.config.hidden_size), device=device)
    cosine_sum = torch.zeros(count, dtype=torch.float64, device=device)
    batches = []
    for rows, ids, mask in batch_by_length(sequences, batch_size, device):
        batches.append(_Batch(torch.tensor(rows, device=device), mask, *decoder.enter(ids, mask)))
        pooled[0, batches[-1].rows] = batches[-1].pool(pooling)
    for index in range(count):
        with decoder.hold(index):
            for batch in batches:
                before = batch.states
                output = decoder.layers[index](before, **batch.contexts[index])
                batch.states = output[0] if isinstance(output, tuple) else output
                pooled[index + 1, batch.rows] = batch.pool(pooling)
                cosine = torch.nn.functional.cosine_similarity(before.float(), batch.states.float(), dim=-1)
                cosine_sum[index] += (cosine * batch.mask).sum(dtype=torch.float64)
        if on_layer:
            on_layer(sum(map(len, sequences)))
    tokens = np.array([len(s) for s in sequences], dtype=np.int64)
    return HiddenStates(pooled.cpu().numpy(), 1.0 - cosine_sum.cpu().numpy() / tokens.sum(), tokens)
