"""Perplexity of a text: windows, negative log-likelihoods, and an error bar that knows windows are clusters."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mka.errors import NumericsError
from mka.evaluation.heldout import MOST_WINDOWS, estimate_rate, predict_windows, refuse_long_context
from mka.evaluation.metrics import Subject
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

    refuse_long_context(model, context)
    windows = cut_windows(tokenizer, texts, name=name, context=context, max_tokens=max_tokens)
    nll = []
    for logits, target in predict_windows(
        model, windows, name=name, what="perplexity", batch_size=batch_size, progress=progress
    ):
        losses = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
        nll.append(float(losses.sum(dtype=torch.float64)))
    return score_windows(name, nll, [windows.predicted] * len(nll), windows.nbytes)


def measure_texts(subject: Subject) -> tuple[Score, ...]:
    """Measure the perplexity of every held-out text; refusals are those of `measure_perplexity`."""
    settings = subject.settings
    return tuple(
        measure_perplexity(
            subject.model,
            subject.tokenizer,
            texts,
            name=name,
            context=settings.context,
            max_tokens=settings.text_tokens,
            batch_size=min(settings.batch_size, MOST_WINDOWS),
            progress=subject.progress,
        )
        for name, texts in subject.texts.items()
    )


def score_windows(name: str, nll: Sequence[float], tokens: Sequence[int], nbytes: Sequence[int]) -> Score:
    """Turn sums per window into perplexity with its standard error.

    The rate in nats per token and its error are those of `mka.evaluation.heldout.estimate_rate`; the delta method
    gives ``se(exp L) = exp(L) se(L)``.

    Raises:
        NumericsError: if the perplexity is not a finite number.
    """
    rate, stderr = estimate_rate(nll, tokens)
    with np.errstate(over="ignore"):
        value = float(np.exp(rate))
    if not math.isfinite(value):
        raise NumericsError(f"held-out text {name!r}: perplexity exp({rate:.4g}) is not a finite number")
    extra = {
        "tokens": int(sum(tokens)),
        "bytes": int(sum(nbytes)),
        "bits_per_byte": float(np.sum(nll) / (math.log(2) * sum(nbytes))),
        "nats_per_token": rate,
        "nats_per_token_stderr": stderr,
    }
    items = tuple((float(a), int(b)) for a, b in zip(nll, tokens))
    return Score(name, "perplexity", value, value * stderr, len(nll), False, items, extra)
