"""A base model held against stock's own class before work begins: every key, every shape, every token."""

from dataclasses import replace
from pathlib import Path

import torch

from mka.errors import CheckpointError
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.config import build_config
from mka.model.loading import load_tokenizer
from mka.model.outline import build_outline, find_pieces
from mka.model.tensors import FLOATS
from mka.store.sums import SUMS_NAME
from mka.terminal import quiet_libraries, say

# Bytes of a head and of an embedding that are compared at a time.
_COMPARED = 1 << 23


def open_base(folder: Path, *, trust_remote_code: bool = False, verified: bool = False) -> Checkpoint:
    """Open a model that is to be worked on, and refuse it unless stock loading would make the same model of it.

    Args:
        folder: see `mka.model.checkpoint.open_checkpoint`.
        trust_remote_code: run Python code that comes with the tokenizer.
        verified: its files were compared with its sums a moment ago.

    Raises:
        CheckpointError: of `open_checkpoint`; and if tensors are not those of stock's class or no floating-point
            numbers, a head differs from the embedding it is tied to, or the tokenizer has tokens that the embedding
            has not.
    """
    checkpoint = open_checkpoint(folder, verify=not verified)
    if verified:
        checkpoint = replace(checkpoint, verified=(folder / SUMS_NAME).exists())
    if not checkpoint.is_quantized:
        _check_floats(checkpoint)
        with quiet_libraries():
            find_pieces(checkpoint, build_outline(checkpoint, torch.float32))
        _check_head(checkpoint)
        checkpoint = replace(checkpoint, rowless=_find_rowless(checkpoint, trust_remote_code))
    if left := sorted(checkpoint.left_out):
        say(f"{folder}: {len(left)} stored tensors are left out, since readers make them of the config, e.g. {left[0]}")
    return checkpoint


def _check_floats(checkpoint: Checkpoint) -> None:
    """Refuse tensors of anything but floating-point numbers of at least two bytes, by the name of the first."""
    for info in checkpoint.tensors.values():
        if info.dtype not in FLOATS:
            what = "in fp8, which needs scales" if info.dtype.startswith("F8") else "no floating-point numbers"
            raise CheckpointError(
                f"{checkpoint.path}: {info.name} is stored as {info.dtype}, {what}, and config.json names no "
                f"quantization; allowed: {', '.join(FLOATS)}; give the original weights"
            )


def _check_head(checkpoint: Checkpoint) -> None:
    """Refuse a head that is tied by the config, stored beside the embedding, and another: readers would differ."""
    config, family = build_config(checkpoint.config, checkpoint.path), checkpoint.family
    embedding, head = family.embedding_tensor, family.head_tensor
    if not config.tie_word_embeddings or head not in checkpoint.tensors:
        return
    shapes = [(checkpoint.tensors[name].shape, checkpoint.tensors[name].dtype) for name in (embedding, head)]
    with checkpoint.reader() as read:
        pairs = zip(read.blocks(embedding, _COMPARED), read.blocks(head, _COMPARED))
        if shapes[0] == shapes[1] and all(_same_bytes(*pair) for pair in pairs):
            return
    raise CheckpointError(
        f"{checkpoint.path}: config.json ties {head} to {embedding}, and both are stored and differ; set "
        "tie_word_embeddings to false if the head was trained apart, else take it out"
    )


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _find_rowless(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[str, ...]:
    """Return marks that stand for tokens the embedding has no rows for, as Gemma 3 has one for pictures.

    A tokenizer that does not load is refused by who needs it.

    Raises:
        CheckpointError: if there are such tokens that text may hold unawares, or that the tokenizer itself puts in.
    """
    try:
        with quiet_libraries():
            tokenizer = load_tokenizer(checkpoint.path, trust_remote_code)
    except CheckpointError:
        return ()
    rows = checkpoint.tensors[checkpoint.family.embedding_tensor].shape[0]
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    roles = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    marks = {number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    if beyond.keys() <= marks - roles:
        return tuple(beyond[number] for number in sorted(beyond))
    shown = ", ".join(f"{beyond[number]!r} ({number})" for number in sorted(beyond)[:3])
    raise CheckpointError(
        f"{checkpoint.path}: the tokenizer has {len(beyond)} tokens beyond the embedding's {rows} rows: {shown}"
        f"{', …' if len(beyond) > 3 else ''}; take them out of the tokenizer, or give the embedding rows for them "
        "(transformers' resize_token_embeddings)"
    )
