"""A model's predictions on held-out text, window by window, and the error of a rate over windows."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from mka.errors import NumericsError
from mka.texts.positions import check_context
from mka.texts.windows import Windows

if TYPE_CHECKING:
    import torch

# Windows per forward pass: logits of more would be the peak of memory and no faster.
MOST_WINDOWS = 4


def predict_windows(
    model: Any, windows: Windows, *, name: str, what: str, batch_size: int = MOST_WINDOWS, progress: bool = True
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Yield logits, (T, V), and the tokens they predict, (T,), of each window.

    Args:
        model: transformers causal language model in eval mode.
        windows: of `mka.texts.windows.cut_windows`.
        name: the text's name.
        what: is measured; for the bar.
        batch_size: windows per forward pass.
        progress: show a bar with tokens per second.

    Raises:
        NumericsError: if a logit is NaN or infinite.
    """
    import torch

    from mka.terminal import show_progress

    total = len(windows.ids) * windows.predicted
    bar = show_progress(f"{what} {name}", total, "tok") if progress else nullcontext(lambda _: None)
    with bar as advance:
        for first in range(0, len(windows.ids), batch_size):
            batch = torch.tensor(windows.ids[first : first + batch_size], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            # One window at a time: a float32 copy of the logits is the peak of memory.
            for row, target in zip(logits, batch[:, 1:]):
                if not bool(row.isfinite().all()):
                    raise NumericsError(f"held-out text {name!r}: the model's logits are NaN or infinite")
                yield row, target
                advance(windows.predicted)


def refuse_long_context(model: Any, context: int) -> None:
    """Refuse windows longer than the model reads.

    Raises:
        RecipeError: if they are.
    """
    check_context(context, getattr(model.config, "max_position_embeddings", None))


def estimate_rate(sums: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """Rate of sums per weight over windows, with its standard error.

    With N_i and T_i of window i of n, ``L = sum N / sum T`` is a ratio estimator over clusters; its variance is
    ``n/(n-1) * sum (N_i - L T_i)^2 / (sum T)^2`` (Cochran, Sampling Techniques, 3rd ed., eq. 6.13, no
    finite-population factor).
    """
    values, counts = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    n, total = len(values), float(counts.sum())
    rate = float(values.sum() / total)
    return rate, math.sqrt(n / (n - 1) * float(np.square(values - rate * counts).sum())) / total
