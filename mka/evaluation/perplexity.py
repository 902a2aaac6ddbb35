"""Perplexity of a text: windows, negative log-likelihoods, and an error bar that knows windows are clusters."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from mka.errors import NumericsError, RecipeError
from mka.evaluation.scores import Score
from mka.texts.windows import cut_windows


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

    from mka.terminal import show_progress

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
