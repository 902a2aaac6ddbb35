"""Bootstrap over windows and items, paired: every model is resampled alike, so what all find hard cancels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from mka.errors import GuardError, NumericsError
from mka.evaluation.metrics import find_metric
from mka.evaluation.scores import Score

CONFIDENCE = 0.95
# Resamples held in memory at once: a block is at most about 8 million indices.
_BLOCK = 8_000_000


def bound_levels(n: int, tail: float = 1 - CONFIDENCE) -> tuple[float, float]:
    """Return the quantile levels of the lower and upper bound for a sample of n, ``tail`` outside each of them."""
    level = float(ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, tail)))
    return level, 1 - level


def resample_means(
    groups: Sequence[Sequence[Score]], *, seed: int, resamples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of items of several models, and the same in bootstrap resamples that all models share.

    Of windows, a mean is the sum of sums over the sum of weights. The resamples of a name depend on the seed, the name
    and its number of items only, not on which models or other names are asked. Of several names the means are added
    up, so that each weighs the same.

    Args:
        groups: per name one score per model, K of them, of the same items.
        seed: of the resampling.
        resamples: bootstrap resamples R.

    Returns:
        The sums of means over the names, (K,), and the resampled ones, (R, K).

    Raises:
        GuardError: if the scores of a name are not of the same items.
        NumericsError: if an item is not finite.
    """
    total: NDArray[np.float64] = np.zeros((resamples + 1, len(groups[0])))
    for scores in groups:
        first = scores[0]
        for score in scores[1:]:
            if reason := find_mismatch(first, score):
                raise GuardError(f"{first.name!r}: two models differ in {reason}; evaluate all of them alike")
        weighted = find_metric(first.metric).resampled == "windows"
        columns = [[item[0] if weighted else item for item in score.items] for score in scores]
        values = np.array(columns + ([[item[1] for item in first.items]] if weighted else []), dtype=np.float64).T
        if not np.isfinite(values).all():
            raise NumericsError(f"{first.name!r}: a value of {first.metric} is NaN or infinite")
        drawn = _average_resamples(values, resamples, _generator(seed, first.name))
        means = np.concatenate([values.mean(axis=0, keepdims=True), drawn])
        total += means[:, :-1] / means[:, -1:] if weighted else means
    return total[0], total[1:]


def find_bounds(draws: NDArray[np.float64], n: int, tail: float = 1 - CONFIDENCE) -> tuple[float, float]:
    """Return the bounds that resamples give, by the expanded percentiles of `bound_levels`: observed draws both.

    A draw that is NaN, a resample in which neither of two models solves anything, says nothing and is left out.
    """
    low, high = bound_levels(n, tail)
    known = draws[~np.isnan(draws)]
    # method: an observed draw, never an interpolation, because draws may be infinite.
    return float(np.quantile(known, low, method="lower")), float(np.quantile(known, high, method="higher"))


def find_mismatch(before: Score, after: Score) -> str | None:
    """Say in what two scores of one name differ that have to be of the same items; None if in nothing."""
    if not before.n == after.n == len(before.items) == len(after.items) or before.n < 2:
        return (
            f"items: n {before.n} and {after.n}, values {len(before.items)} and {len(after.items)} (2 or more needed)"
        )
    if find_metric(before.metric).resampled == "windows" and [i[1] for i in before.items] != [
        i[1] for i in after.items
    ]:
        return "tokens per window"
    same = before.extra.get("items_digest") == after.extra.get("items_digest")
    return None if same else "the items themselves"


def _generator(seed: int, name: str) -> np.random.Generator:
    # Each source and task has its own stream: adding one does not move the others.
    return np.random.default_rng([seed, *name.encode()])


def _average_resamples(
    values: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Average columns over bootstrap resamples of rows: (n, columns) -> (resamples, columns)."""
    n = len(values)
    block = max(1, _BLOCK // n)
    means = []
    for first in range(0, resamples, block):
        picked = generator.integers(n, size=(min(block, resamples - first), n))
        means.append(np.stack([column[picked].mean(axis=1) for column in values.T], axis=1))
    return np.concatenate(means)
