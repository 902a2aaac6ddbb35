"""Hidden states of every layer in one forward pass, pooled as they appear."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from mka.errors import CalibrationError
from mka.states import HiddenStates


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Tokenize with the tokenizer's own default special tokens (BOS only where it adds one), cut to ``max_tokens``.

    Raises:
        CalibrationError: if a text has no token at all.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens, add_special_tokens=True)["input_ids"]
    empty = [i for i, ids in enumerate(encoded) if not ids]
    if empty:
        raise CalibrationError(f"calibration text {empty[0]} has no tokens ({len(empty)} such texts); remove them")
    return [list(ids) for ids in encoded]


def pad(sequences: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad token ids to one length.

    Causal attention never looks right, so padding changes no real token; the mask keeps it out of every sum.

    Returns:
        Ids and mask, both (S, T) int64.
    """
    width = max(len(s) for s in sequences)
    ids = torch.zeros((len(sequences), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(list(sequence))
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def batch_by_length(
    sequences: Sequence[Sequence[int]], batch_size: int, device: Any
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Yield padded batches, longest texts first, so that little is padded.

    Yields:
        The rows of ``sequences`` in the batch, (S,), and their ids and mask, both (S, T).
    """
    order = np.argsort([-len(s) for s in sequences], kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, *pad([sequences[i] for i in rows], device)


class _LayerTap:
    """Forward hooks that pool each layer's raw output the moment it exists."""

    def __init__(self, layers: torch.nn.ModuleList, pooled: np.ndarray, pooling: str) -> None:
        self.pooled = pooled
        self.pooling = pooling
        self.cosine_sum = np.zeros(len(layers))
        self.rows: np.ndarray = np.empty(0, dtype=int)
        self.mask: torch.Tensor | None = None
        self.previous: torch.Tensor | None = None
        self.handles = [layers[0].register_forward_pre_hook(self._embedding, with_kwargs=True)]
        self.handles += [layer.register_forward_hook(self._output(i)) for i, layer in enumerate(layers)]

    def _embedding(self, module: Any, args: Any, kwargs: Any) -> None:
        self._take(0, args[0] if args else kwargs["hidden_states"])

    def _output(self, index: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            current = output[0] if isinstance(output, tuple) else output
            previous, mask = self.previous, self.mask
            assert previous is not None and mask is not None
            cosine = torch.nn.functional.cosine_similarity(previous.float(), current.float(), dim=-1)
            self.cosine_sum[index] += float((cosine * mask).sum(dtype=torch.float64))
            self._take(index + 1, current)

        return hook

    def _take(self, position: int, states: torch.Tensor) -> None:
        mask = self.mask
        assert mask is not None
        if self.pooling == "last":
            last = mask.sum(dim=1) - 1
            vectors = states[torch.arange(states.shape[0], device=states.device), last].float()
        else:
            weights = mask.unsqueeze(-1).float()
            vectors = (states.float() * weights).sum(dim=1) / weights.sum(dim=1)
        self.pooled[position, self.rows] = vectors.cpu().numpy()
        self.previous = states

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.inference_mode()
def observe(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int,
    pooling: Literal["last", "mean"] = "last",
    batch_size: int = 16,
    on_batch: Callable[[int], Any] | None = None,
) -> HiddenStates:
    """Observe all layers in one forward pass per batch, without the language-model head.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        texts: N calibration texts.
        max_tokens: tokens kept of each.
        pooling: "last" real token, or "mean" over real tokens.
        batch_size: texts per pass; texts of like length share a batch, so that little is padded.
        on_batch: called with the number of real tokens of each batch.

    Returns:
        `HiddenStates` with pooled (L+1, N, D); memory is that array plus one batch.

    Raises:
        CalibrationError: if a text has no tokens.
        NumericsError: if hidden states are not finite.
    """
    sequences = tokenize(tokenizer, texts, max_tokens)
    decoder = model.model
    layers = decoder.layers
    pooled = np.empty((len(layers) + 1, len(sequences), model.config.hidden_size), dtype=np.float32)
    tap = _LayerTap(layers, pooled, pooling)
    try:
        for rows, ids, mask in batch_by_length(sequences, batch_size, model.device):
            tap.rows, tap.mask, tap.previous = rows, mask, None
            decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            if on_batch:
                on_batch(int(mask.sum()))
    finally:
        tap.remove()
    tokens = np.array([len(s) for s in sequences], dtype=np.int64)
    return HiddenStates(pooled, 1.0 - tap.cosine_sum / tokens.sum(), tokens)
