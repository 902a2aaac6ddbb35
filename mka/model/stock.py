"""A base model held against stock's own class before work begins: every key, every shape, every token."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from mka.errors import CheckpointError
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.config import build_config
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
        CheckpointError: of `open_checkpoint`; and if tensors are not those of stock's class, a head differs from the
            embedding it is tied to, or the tokenizer has tokens that the embedding has not.
    """
    checkpoint = open_checkpoint(folder, verify=not verified)
    if verified:
        checkpoint = replace(checkpoint, verified=(folder / SUMS_NAME).exists())
    if not checkpoint.is_quantized:
        with quiet_libraries():
            find_pieces(checkpoint, build_outline(checkpoint, torch.float32))
        _check_head(checkpoint)
        checkpoint = replace(checkpoint, rowless=_find_rowless(checkpoint, trust_remote_code))
    if left := sorted(checkpoint.left_out):
        say(f"{folder}: {len(left)} stored tensors are left out, since readers make them of the config, e.g. {left[0]}")
    return checkpoint


def build_outline(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build stock's class from a config, its parameters without values.

    Raises:
        CheckpointError: if transformers refuses the config.
    """
    from transformers import AutoModelForCausalLM

    config = build_config(checkpoint.config, checkpoint.path)
    try:
        with _without_values():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint.path}: config.json is refused: {reason}") from None
    return model.eval()


def find_pieces(checkpoint: Checkpoint, model: Any) -> dict[str, tuple[str, ...]]:
    """Return the stored tensors that make each parameter; refuse weights that are not the config's, as loaders do.

    Args:
        checkpoint: unquantized.
        model: of `build_outline`.

    Raises:
        CheckpointError: if a weight is missing, left over or of another shape than the config says.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if model.config.tie_word_embeddings:
        found.pop(checkpoint.family.head_tensor, None)
    pieces = {
        name: (name,) if name in found else checkpoint.family.stored_pieces(name, shape[0])
        for name, shape in shapes.items()
    }
    wanted = {piece for names in pieces.values() for piece in names}
    _refuse(checkpoint, "missing", wanted - found.keys())
    _refuse(checkpoint, "unexpected", found.keys() - wanted)
    fits = {name: _fits([found[piece] for piece in pieces[name]], shape) for name, shape in shapes.items()}
    _refuse(checkpoint, "mismatched", [name for name, fit in fits.items() if not fit])
    return pieces


def _fits(pieces: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes, row behind row, make one of that shape."""
    if len(pieces) == 1:
        return pieces[0] == shape
    return sum(map(math.prod, pieces)) == math.prod(shape) and {piece[1:] for piece in pieces} == {shape[2:]}


def _refuse(checkpoint: Checkpoint, kind: str, names: Sequence[str] | set[str]) -> None:
    if names:
        raise CheckpointError(
            f"{checkpoint.path}: config and weights disagree: {len(names)} {kind} keys, e.g. {sorted(names)[0]}; "
            "fetch or write the model again"
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
    from mka.model.loading import load_tokenizer

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


@contextmanager
def _without_values() -> Iterator[None]:
    """Parameters made within the block have a shape only; buffers, which no checkpoint holds, have their values.

    By torch's own hook: accelerate's `init_empty_weights` does the same, and would be a package more on a GPU machine.
    """

    def make_empty(module: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        return None if value is None else torch.nn.Parameter(value.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(make_empty)
    try:
        yield
    finally:
        hook.remove()
