"""Calibration windows: texts of several sources packed into token windows of one length."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mka.errors import CalibrationError
from mka.perplexity import SEPARATOR, find_bos


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
    for text in texts:
        if most is not None and len(tokens) >= most * width:
            break
        tokens += tokenizer(text + SEPARATOR, add_special_tokens=False, verbose=False)["input_ids"]
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
