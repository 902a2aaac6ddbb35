"""Texts as padded batches of token ids."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mka.errors import CalibrationError


def take_tokens(tokenizer: Any, texts: Sequence[str], max_tokens: int, tokens: int) -> list[list[int]]:
    """Tokenize texts in order until ``tokens`` tokens are there, each cut to ``max_tokens``."""
    taken: list[list[int]] = []
    count = 0
    for ids in tokenize(tokenizer, texts, max_tokens):
        if count >= tokens:
            break
        taken.append(ids)
        count += len(ids)
    return taken


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
