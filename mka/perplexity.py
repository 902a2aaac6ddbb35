"""Perplexity of a text: windows, negative log-likelihoods, and an error bar that knows windows are clusters."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from mka.errors import NumericsError, RecipeError
from mka.measurements import Score

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


def measure_perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    name: str,
    context: int = 512,
    max_tokens: int = 4096,
    batch_size: int = 4,
    progress: bool = True,
) -> Score:
    """Measure the perplexity of a text under a model, windows as `cut_windows` makes them.

    Log-softmax in float32, sums in float64. ``value = exp(sum of nll / predicted tokens)``.

    Args:
        model: transformers causal language model in eval mode.
        tokenizer: its tokenizer.
        texts: the source's texts, joined in this order.
        name: the source's name.
        context: tokens per window.
        max_tokens: most tokens to predict.
        batch_size: windows per forward pass.
        progress: show a bar with tokens per second.

    Returns:
        A `Score` whose items are ``(nll in nats, predicted tokens)`` per window and whose ``extra`` holds tokens,
        bytes, bits_per_byte, nats_per_token and nats_per_token_stderr.

    Raises:
        RecipeError: on too little text, or a context longer than the model's positions.
        NumericsError: if a logit is NaN or infinite.
    """
    import torch

    from mka.progress import show_progress

    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise RecipeError(f"context {context} is longer than the model's {longest} positions; lower the context")
    windows = cut_windows(tokenizer, texts, name=name, context=context, max_tokens=max_tokens)
    nll: list[float] = []
    total = len(windows.ids) * windows.predicted
    bar = show_progress(f"perplexity {name}", total, "tok") if progress else nullcontext(lambda _: None)
    with bar as advance, torch.inference_mode():
        for first in range(0, len(windows.ids), batch_size):
            batch = torch.tensor(windows.ids[first : first + batch_size], device=model.device)
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            # One window at a time: the float32 copy of the logits is the peak of memory.
            for row, target in zip(logits, batch[:, 1:]):
                if not bool(row.isfinite().all()):
                    raise NumericsError(f"held-out text {name!r}: the model's logits are NaN or infinite")
                losses = torch.nn.functional.cross_entropy(row.float(), target, reduction="none")
                nll.append(float(losses.sum(dtype=torch.float64)))
                advance(windows.predicted)
    return score_windows(name, nll, [windows.predicted] * len(nll), windows.nbytes)


def score_windows(name: str, nll: Sequence[float], tokens: Sequence[int], nbytes: Sequence[int]) -> Score:
    """Turn sums per window into perplexity with its standard error.

    With N_i nats and T_i tokens in window i of n, ``L = sum N / sum T`` is a ratio estimator over clusters; its
    variance is ``n/(n-1) * sum (N_i - L T_i)^2 / (sum T)^2`` (Cochran, Sampling Techniques, 3rd ed., eq. 6.13,
    no finite-population factor), and the delta method gives ``se(exp L) = exp(L) se(L)``.

    Raises:
        NumericsError: if the perplexity is not a finite number.
    """
    sums, counts = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    n, total = len(sums), float(counts.sum())
    rate = float(sums.sum() / total)
    stderr = math.sqrt(n / (n - 1) * float(np.square(sums - rate * counts).sum())) / total
    with np.errstate(over="ignore"):
        value = float(np.exp(rate))
    if not math.isfinite(value):
        raise NumericsError(f"held-out text {name!r}: perplexity exp({rate:.4g}) is not a finite number")
    extra = {
        "tokens": int(total),
        "bytes": int(sum(nbytes)),
        "bits_per_byte": float(sums.sum() / (math.log(2) * sum(nbytes))),
        "nats_per_token": rate,
        "nats_per_token_stderr": stderr,
    }
    items = tuple((float(a), int(b)) for a, b in zip(nll, tokens))
    return Score(name, "perplexity", value, value * stderr, n, False, items, extra)
