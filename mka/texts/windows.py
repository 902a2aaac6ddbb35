"""Texts cut into windows of one length: for measuring, and for fitting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from mka.errors import CalibrationError, RecipeError

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Windows:
    """A text cut for measuring.

    Attributes:
        ids: tokens per window, (n, 1 + predicted); the first column is context only.
        nbytes: UTF-8 bytes of the predicted text per window, (n,).
    """

    ids: list[list[int]]
    nbytes: list[int]

    @property
    def predicted(self) -> int:
        """Predicted tokens per window."""
        return len(self.ids[0]) - 1


def find_bos(tokenizer: Any, text: str) -> list[int]:
    """Return what the tokenizer starts its sequences with: BOS or nothing."""
    start = tokenizer(text[:8], verbose=False)["input_ids"]
    return [tokenizer.bos_token_id] if start and start[0] == tokenizer.bos_token_id else []


def cut_windows(tokenizer: Any, texts: Sequence[str], *, name: str, context: int, max_tokens: int) -> Windows:
    """Join the texts with a blank line, tokenize once, and cut non-overlapping windows.

    A tokenizer that starts its sequences with BOS gets BOS before every window, and a window predicts all its
    ``context`` tokens. Any other predicts ``context - 1`` tokens, given the first. A rest shorter than a window is
    left out.

    Bytes are those of the source text between the end of the last unpredicted token and the end of the last
    predicted one (the tokenizer's offsets), so that all windows of a BOS tokenizer add up to the text they cover.
    Slow tokenizers have no offsets; there the decoded window is counted.

    Raises:
        RecipeError: if there are fewer than two windows: one window has no error bar.
    """
    text = SEPARATOR.join(texts)
    bos = find_bos(tokenizer, text)
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    tokens = encoded["input_ids"]
    predicted = context if bos else context - 1
    count = min(len(tokens) // context, max_tokens // predicted)
    if count < 2:
        raise RecipeError(
            f"held-out text {name!r}: {len(tokens)} tokens and a budget of {max_tokens} make {count} windows of "
            f"{context} tokens, at least 2 are needed; lower the context or give more text"
        )
    ids, nbytes = [], []
    ends = [end for _, end in encoded["offset_mapping"]] if fast else []
    for first in range(0, count * context, context):
        body = tokens[first : first + context]
        ids.append(bos + body)
        if fast:
            known = first - 1 if bos else first
            nbytes.append(len(text[ends[known] if known >= 0 else 0 : ends[first + context - 1]].encode()))
        else:
            nbytes.append(len(tokenizer.decode(body[-predicted:]).encode()))
    return Windows(ids, nbytes)


def pack_windows(tokenizer: Any, texts: Sequence[str], context: int, most: int | None = None) -> list[list[int]]:
    """Join texts with a blank line and cut windows of ``context`` tokens, each after BOS where the tokenizer adds it.

    Args:
        tokenizer: the model's.
        texts: in order.
        context: tokens per window, BOS included.
        most: windows wanted; texts that are not needed for them are not tokenized. None: all.
    """
    bos = find_bos(tokenizer, texts[0] if texts else "a")
    width = context - len(bos)
    tokens: list[int] = []
    # Of a list a fast tokenizer takes all cores; where little is wanted, one text after the other is less work.
    step = 1024 if most is None else 1
    for first in range(0, len(texts), step):
        if most is not None and len(tokens) >= most * width:
            break
        some = [text + SEPARATOR for text in texts[first : first + step]]
        tokens += chain.from_iterable(tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"])
    count = len(tokens) // width if most is None else min(most, len(tokens) // width)
    return [bos + tokens[i * width : (i + 1) * width] for i in range(count)]


def deal_windows(
    tokenizer: Any, texts: Mapping[str, Sequence[str]], *, context: int, tokens: int
) -> dict[str, torch.Tensor]:
    """Cut windows from every source, each source by its share of the windows there are.

    Args:
        tokenizer: the model's.
        texts: source -> its texts.
        context: tokens per window.
        tokens: most tokens in all.

    Returns:
        Source -> windows, (S, T) int64; sources too short for a window are left out.

    Raises:
        CalibrationError: if there are fewer than two windows.
    """
    packed = {source: pack_windows(tokenizer, list(given), context) for source, given in texts.items()}
    packed = {source: windows for source, windows in packed.items() if windows}
    there, wanted = sum(map(len, packed.values())), tokens // context
    if min(there, wanted) < 2:
        raise CalibrationError(
            f"alignment: {there} windows of {context} tokens in the table, {wanted} asked for by tokens: {tokens}; "
            f"at least 2 are needed: give more text, more tokens or a smaller context"
        )
    share = min(1.0, wanted / there)
    dealt = {source: int(share * len(windows)) for source, windows in packed.items()}
    # What rounding left over goes to the sources that lost most by it.
    loss = sorted(packed, key=lambda source: dealt[source] - share * len(packed[source]))
    for source in loss[: min(there, wanted) - sum(dealt.values())]:
        dealt[source] += 1
    return {source: torch.tensor(packed[source][:n]) for source, n in dealt.items() if n}


def make_copies(windows: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Return windows whose second half repeats the first: tokens of other windows in random order, said twice.

    Nothing but copying predicts the second half, so what attention does for copying, which prose rarely needs and
    text with many repeated marks or names needs everywhere, shows in few windows.

    Args:
        windows: (S, T) int64; drawn from evenly, the first token (a BOS, where there is one) kept in place.
        count: windows wanted.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    length = windows.shape[1]
    half = (length - 1) // 2
    copies = []
    for index in range(count):
        source = windows[index * len(windows) // count]
        said = source[1:][torch.randperm(length - 1, generator=generator)[:half]]
        copies.append(torch.cat([source[:1], said, said, said[: length - 1 - 2 * half]]))
    return torch.stack(copies) if copies else windows[:0]
