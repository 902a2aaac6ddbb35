"""Bootstrap over windows and items, paired: every model is resampled alike, so what all find hard cancels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from mka.errors import GuardError, NumericsError
from mka.evaluation.scores import Score

CONFIDENCE = 0.95
# Resamples held in memory at once: a block is at most about 8 million indices.
_BLOCK = 8_000_000


def bound_levels(n: int, tail: float = 1 - CONFIDENCE) -> tuple[float, float]:
    """Return the quantile levels of the lower and upper bound for a sample of n, ``tail`` outside each of them."""
    level = float(ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, tail)))
    return level, 1 - level


def resample_rates(
    scores: Sequence[Score], *, seed: int, resamples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nats per token of several models on one text, and in bootstrap resamples of its windows that all of them share.

    The resamples depend on the seed, the text's name and its number of windows only, not on which models are asked.

    Args:
        scores: one perplexity score per model, K of them, of the same windows.
        seed: of the resampling.
        resamples: bootstrap resamples R.

    Returns:
        The rates, (K,), and the resampled rates, (R, K).

    Raises:
        GuardError: if the scores are not of the same windows.
        NumericsError: if a negative log-likelihood is not finite.
    """
    first = scores[0]
    for score in scores[1:]:
        if reason := _mismatch(first, score):
            raise GuardError(f"{first.name!r}: two models differ in {reason}; evaluate all of them alike")
    sums = np.array([[item[0] for item in score.items] for score in scores], dtype=np.float64)
    sums = np.concatenate([sums, [[item[1] for item in first.items]]]).T
    if not np.isfinite(sums).all():
        raise NumericsError(f"text {first.name!r}: a window's negative log-likelihood is NaN or infinite")
    means = np.concatenate(
        [sums.mean(axis=0, keepdims=True), _resample_means(sums, resamples, _generator(seed, first.name))]
    )
    rates = means[:, :-1] / means[:, -1:]
    return rates[0], rates[1:]


def resample_recovery(
    pairs: Sequence[tuple[Score, Score]], *, seed: int, resamples: int
) -> tuple[float, NDArray[np.float64]]:
    """Mean task score of one model over that of another, and the same in resamples of the items they share.

    Args:
        pairs: per task the score of the divisor and of the dividend.
        seed: of the resampling.
        resamples: bootstrap resamples R.

    Returns:
        The ratio, and up to R resampled ones: a resample in which neither solves anything is left out.

    Raises:
        GuardError: if two scores of one task are not of the same items.
        NumericsError: if the divisor solves no item.
    """
    for before, after in pairs:
        if reason := _mismatch(before, after):
            raise GuardError(f"{before.name!r}: two models differ in {reason}; evaluate both alike")
    return _task_recovery(pairs, resamples, seed)


def find_bounds(draws: NDArray[np.float64], n: int, tail: float = 1 - CONFIDENCE) -> tuple[float, float]:
    """Return the bounds that resamples give, by the expanded percentiles of `bound_levels`: observed draws both."""
    low, high = bound_levels(n, tail)
    # method: an observed draw, never an interpolation, because draws may be infinite.
    return float(np.quantile(draws, low, method="lower")), float(np.quantile(draws, high, method="higher"))


def _generator(seed: int, name: str) -> np.random.Generator:
    # Each source and task has its own stream: adding one does not move the others.
    return np.random.default_rng([seed, *name.encode()])


def _resample_means(values: NDArray[np.float64], resamples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Average columns over bootstrap resamples of rows: (n, columns) -> (resamples, columns)."""
    n = len(values)
    block = max(1, _BLOCK // n)
    means = []
    for first in range(0, resamples, block):
        picked = generator.integers(n, size=(min(block, resamples - first), n))
        means.append(np.stack([column[picked].mean(axis=1) for column in values.T], axis=1))
    return np.concatenate(means)


def _task_recovery(
    pairs: Sequence[tuple[Score, Score]], resamples: int, seed: int
) -> tuple[float, NDArray[np.float64]]:
    totals = np.zeros((resamples + 1, 2))
    for before, after in pairs:
        values = np.array([before.items, after.items], dtype=np.float64).T
        totals[0] += values.mean(axis=0)
        totals[1:] += _resample_means(values, resamples, _generator(seed, before.name))
    if not totals[0, 0] > 0:
        raise NumericsError("tasks: the base solves no item, so recovery is undefined; take other tasks or more items")
    with np.errstate(divide="ignore", invalid="ignore"):
        recovery = totals[:, 1] / totals[:, 0]
    # 0/0, a resample in which neither solves anything, says nothing of their ratio.
    return float(recovery[0]), recovery[1:][~np.isnan(recovery[1:])]


def _mismatch(before: Score, after: Score) -> str | None:
    if not before.n == after.n == len(before.items) == len(after.items) or before.n < 2:
        return (
            f"items: n {before.n} and {after.n}, values {len(before.items)} and {len(after.items)} (2 or more needed)"
        )
    if before.metric == "perplexity" and [i[1] for i in before.items] != [i[1] for i in after.items]:
        return "tokens per window"
    same = before.extra.get("items_digest") == after.extra.get("items_digest")
    return None if same else "the items themselves"
