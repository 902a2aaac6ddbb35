"""How far a ranking of layer pairs hangs on the texts: half-samples are scored and held against all texts.

A half-sample is half of the texts, drawn without replacement. It shares its texts with the full set and has fewer of
them, so this says how much of the ranking is settled at this number of texts, not how far two sets of texts that share
none would agree. Pure: numbers in, numbers out.
"""

from collections.abc import Sequence

import numpy as np

from mka.evidence.states import LayerScores, Stability
from mka.texts.calibration import MINIMUM_TEXTS

HALVES = 8
# A half has to be a calibration set by itself.
FEWEST_TEXTS = 2 * MINIMUM_TEXTS


def draw_halves(texts: int, halves: int = HALVES, seed: int = 0) -> list[np.ndarray]:
    """Draw half-samples: rising rows, (texts // 2,) each. None below `FEWEST_TEXTS`."""
    if texts < FEWEST_TEXTS:
        return []
    random = np.random.default_rng(seed)
    return [np.sort(random.choice(texts, texts // 2, replace=False)) for _ in range(halves)]


def compare_rankings(whole: np.ndarray, halves: Sequence[np.ndarray], texts: int) -> Stability | None:
    """Hold rankings of the same pairs against the one of all texts; None where there is nothing to rank.

    Args:
        whole: similarity of each pair on all texts, (P,).
        halves: the same on each half-sample, (P,).
        texts: how many all are.
    """
    from scipy.stats import rankdata

    # Of two pairs the better is known once the other is: three are the fewest with a best two to choose.
    if not len(halves) or len(whole) < 3:
        return None
    ranks = [rankdata(values) - (len(whole) + 1) / 2 for values in (whole, *halves)]
    lengths = [float(np.sqrt(rank @ rank)) for rank in ranks]
    # Where all pairs are alike there is no order to agree with.
    correlations = [
        float(ranks[0] @ rank / (lengths[0] * length)) if lengths[0] * length else 0.0
        for rank, length in zip(ranks[1:], lengths[1:])
    ]
    first, firsts = _best_two(whole), [_best_two(half) for half in halves]
    return Stability(
        texts=texts,
        halves=len(halves),
        correlation=float(np.mean(correlations)),
        correlation_least=min(correlations),
        correlation_most=max(correlations),
        best=sum(pair[0] == first[0] for pair in firsts),
        best_two=sum(set(pair) == set(first) for pair in firsts),
    )


def _best_two(values: np.ndarray) -> list[int]:
    """The two pairs that come first; of equals the deeper, as in `mka.plan.grouping.merge_adjacent`."""
    return sorted(range(len(values)), key=lambda i: (-values[i], -i))[:2]


def describe_stability(scores: LayerScores) -> str | None:
    """Say how far the ranking of neighbouring layers hangs on the texts; None of scores that compare no pairs."""
    if scores.kind != "pairwise-similarity":
        return None
    if (found := scores.stability) is None:
        return (
            "How much the order of neighbouring layers depends on the texts was not measured: that takes "
            f"{FEWEST_TEXTS} texts, 4 layers, and similarities that can be had from half of the texts."
        )
    verb = "does not depend" if found.best == found.best_two == found.halves else "depends"
    return (
        f"Which neighbours are most alike {verb} on the texts: over {found.halves} half-samples of {found.texts} "
        f"texts the best pair stays the best in {found.best}, the best two stay the best two in {found.best_two}, and "
        f"the rank correlation with all texts is {found.correlation:.2f} ({found.correlation_least:.2f} to "
        f"{found.correlation_most:.2f})."
    )
