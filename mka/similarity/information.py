"""Nearest-neighbour information measures, in nats, and the similarity built on them (NPIB). numpy and scipy only.

Sources: Kraskov, Stoegbauer & Grassberger, "Estimating mutual information", PRE 69 (2004), algorithm 1; Kozachenko &
Leonenko (1987) for the entropy; MKA (arXiv 2406.16330) for the similarity.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import digamma, gammaln
from scipy.stats import rankdata

from mka.errors import NumericsError, RecipeError
from mka.similarity.diffusion import Array, check_points
from mka.similarity.neighbours import count_closer, count_closer_in_plane, fill_row, mean_digamma, neighbour_distances

Normalisation = Literal["self", "paper"]


def rank_transform(x: ArrayLike) -> Array:
    """Replace each coordinate by its empirical copula, ``(rank - 0.5) / n`` in (0, 1); ties share their mean rank.

    Args:
        x: (N, K).

    Raises:
        NumericsError: if ``x`` is not a finite (N, K) array with N >= 2.
    """
    points = check_points(x, "rank transform")
    return (rankdata(points, axis=0) - 0.5) / len(points)


def information_ceiling(n: int, neighbours: int = 5) -> float:
    """Largest mutual information the k-nearest-neighbour estimator can report on n samples: ``psi(n) - psi(k)``.

    Raises:
        RecipeError: if ``neighbours`` is below 1.
        NumericsError: if n does not exceed ``neighbours``.
    """
    _check_neighbours(n, neighbours)
    return float(digamma(n) - digamma(neighbours))


def mutual_information(x: ArrayLike, y: ArrayLike, *, neighbours: int = 5) -> float:
    """Joint mutual information of two vector variables in nats (KSG, algorithm 1, max-norm), not clipped at 0.

    ``I = psi(k) + psi(n) - <psi(n_x + 1) + psi(n_y + 1)>``, where n_x counts the samples that are strictly closer in x
    than the k-th neighbour is in (x, y). The estimate cannot exceed `information_ceiling` unless distances tie.

    Args:
        x: (N, K).
        y: (N, K'), row i observed together with row i of ``x``.
        neighbours: k >= 1, below N.

    Raises:
        RecipeError: if ``neighbours`` is below 1.
        NumericsError: if the shapes do not fit, a value is not finite, or more than k samples coincide in (x, y).
    """
    first, second = check_points(x, "mutual information, x"), check_points(y, "mutual information, y")
    if len(first) != len(second):
        raise NumericsError(
            f"mutual information: {len(first)} samples of x, {len(second)} of y; allowed: equal numbers"
        )
    n = len(first)
    ceiling = information_ceiling(n, neighbours)
    radii = neighbour_distances(np.hstack([first, second]), neighbours, "mutual information, (x, y)")[None]
    spent = mean_digamma(count_closer(first, radii)) + mean_digamma(count_closer(second, radii))
    return float(ceiling + 2.0 * digamma(neighbours) - spent[0])


def entropy(x: ArrayLike, *, neighbours: int = 5) -> float:
    """Differential entropy in nats (Kozachenko-Leonenko); negative where the density is concentrated.

    ``H = psi(n) - psi(k) + ln c_d + d <ln r_k>`` with r_k the Euclidean distance to the k-th neighbour and
    ``c_d = pi^(d/2) / Gamma(d/2 + 1)`` the volume of the Euclidean unit ball.

    Args:
        x: (N, d).
        neighbours: k >= 1, below N.

    Raises:
        RecipeError: if ``neighbours`` is below 1.
        NumericsError: if ``x`` is not a finite (N, d) array, N is too small, or more than k samples coincide.
    """
    points = check_points(x, "entropy")
    n, d = points.shape
    ceiling = information_ceiling(n, neighbours)
    radii = neighbour_distances(points, neighbours, "entropy", norm=2.0)
    log_volume = 0.5 * d * np.log(np.pi) - gammaln(0.5 * d + 1.0)
    return float(ceiling + log_volume + d * np.log(radii).mean())


def npib(x: ArrayLike, y: ArrayLike, *, neighbours: int = 5, normalisation: Normalisation = "self") -> float:
    """Similarity in [0, 1] of two embeddings of the same samples; see `npib_matrix`.

    Args:
        x: (N, K).
        y: (N, K').
        neighbours: k of the estimators.
        normalisation: "self" or "paper".

    Raises:
        RecipeError: if an option is outside its range.
        NumericsError: as `npib_matrix`.
    """
    points = [check_points(x, "NPIB, x"), check_points(y, "NPIB, y")]
    if len(points[0]) != len(points[1]):
        raise NumericsError(f"NPIB: {len(points[0])} samples of x, {len(points[1])} of y; allowed: equal numbers")
    return float(_npib(points, ["x", "y"], neighbours, normalisation, None)[0, 1])


def npib_matrix(
    embeddings: ArrayLike,
    *,
    neighbours: int = 5,
    normalisation: Normalisation = "self",
    progress: Callable[[int], None] | None = None,
) -> Array:
    """Similarity of every pair of layers, (L, N, K) -> (L, L): symmetric, diagonal 1, in [0, 1].

    Each coordinate is replaced by its ranks, so the result does not change under strictly monotone maps of a
    coordinate, sign flips, reordered coordinates or reordered samples. Then, with I the joint KSG estimate:

    - "self": ``I(X;Y) / sqrt(I(X;X) I(Y;Y))``, all three from the same estimator. Estimates stray from the truth by
      sampling noise, so independent layers can come out a little below 0; the matrix is clipped to [0, 1].
    - "paper": ``I(X;Y) / sqrt(H(X) H(Y))`` with Kozachenko-Leonenko entropies of the ranks in (0, 1). Differential
      entropies are no upper bound of I and their true value there is at most 0, so most data is refused. I(X;X) is
      infinite; the diagonal is 1 by convention. Nothing is clipped.

    Time grows about as ``L^2 N log N``, plus ``L N^1.5`` where K is 2 and ``L N^2 log N`` where it is not. All cores
    that this process may use take part; how many they are changes no bit of the result.

    Args:
        embeddings: (L, N, K), the coordinates of the same N samples after each layer.
        neighbours: k of the estimators, below N.
        normalisation: "self" or "paper".
        progress: called with the number of pairs just finished; they add up to ``L (L + 1) / 2``.

    Raises:
        RecipeError: if an option is outside its range.
        NumericsError: if the shape is another one, a value is not finite, more than k samples of a layer coincide, or,
            in "paper", an entropy is not positive or a similarity leaves [0, 1].
    """
    layers = np.asarray(embeddings, dtype=np.float64)
    if layers.ndim != 3 or len(layers) < 1:
        raise NumericsError(f"NPIB: embeddings of shape {layers.shape}; allowed: (layers, samples, coordinates)")
    names = [f"layer {i}" for i in range(len(layers))]
    points = [check_points(layer, f"NPIB, {name}") for layer, name in zip(layers, names)]
    return _npib(points, names, neighbours, normalisation, progress)


def _npib(
    points: Sequence[Array],
    names: Sequence[str],
    neighbours: int,
    normalisation: Normalisation,
    progress: Callable[[int], None] | None,
) -> Array:
    if normalisation not in get_args(Normalisation):
        raise RecipeError(f"NPIB: normalisation is {normalisation!r}; allowed: {', '.join(get_args(Normalisation))}")
    information = _information_matrix(points, names, neighbours, progress)
    if normalisation == "paper":
        return _divide_by_entropies(information, points, names, neighbours)
    own = np.diag(information)
    # The root of the product, not the product of roots: sqrt(a * a) is exactly a, so identical layers are exactly 1.
    similarity = np.clip(information / np.sqrt(np.outer(own, own)), 0.0, 1.0)
    np.fill_diagonal(similarity, 1.0)
    return similarity


def _information_matrix(
    points: Sequence[Array],
    names: Sequence[str],
    neighbours: int,
    progress: Callable[[int], None] | None,
) -> Array:
    """Joint KSG information of every pair of rank-transformed point sets.

    Distances are measured on as many threads as there are cores; what they find does not depend on their number. Work
    memory is about ``4 L^2 N`` bytes, and up to ``8000 N`` for each thread.
    """
    count, n = len(points), len(points[0])
    ceiling = information_ceiling(n, neighbours)
    # Twice the rank is a whole number even where ranks are shared. In whole numbers distances are exact, so that ties
    # are ties, also after a sign flip; KSG does not change under the common scale 2 n. A coordinate is read at a time.
    ranks = [np.asfortranarray(np.rint(2.0 * rankdata(x, axis=0)).astype(np.int32)) for x in points]
    radii = np.empty((count, count, n), dtype=np.int32)
    spent = np.empty((count, count))
    pool = ThreadPoolExecutor(_count_cores())
    try:
        # Rows arrive in order, whichever thread is first: so does progress, and what is refused is the first of all.
        for i, _ in enumerate(pool.map(lambda i: fill_row(radii, i, ranks, names, neighbours), range(count))):
            # By now every radius that involves layer i is known, so its samples are put in order once for all pairs.
            count_nearer = count_closer_in_plane if ranks[i].shape[1] == 2 else count_closer
            spent[i] = mean_digamma(count_nearer(ranks[i], radii[i]))
            if progress is not None:
                progress(count - i)
    finally:
        # Neither a refusal nor Ctrl-C waits for rows nobody will read.
        pool.shutdown(cancel_futures=True)
    return ceiling + 2.0 * digamma(neighbours) - (spent + spent.T)


def _count_cores() -> int:
    """Cores this process may use, as far as the platform tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _divide_by_entropies(information: Array, points: Sequence[Array], names: Sequence[str], neighbours: int) -> Array:
    entropies = [entropy(rank_transform(x), neighbours=neighbours) for x in points]
    similarity = np.eye(len(points))
    for i, first in enumerate(entropies):
        for j in range(i):
            where = f"NPIB, normalisation 'paper', {names[j]} and {names[i]}"
            given = f"I {information[i, j]:.4g}, H {entropies[j]:.4g} and {first:.4g} nats"
            # A positive product of two negative entropies is no scale of information either.
            if not (first > 0.0 and entropies[j] > 0.0):
                raise NumericsError(f"{where}: {given}; allowed: entropies above 0; use normalisation 'self'")
            value = information[i, j] / np.sqrt(first * entropies[j])
            if not 0.0 <= value <= 1.0:
                raise NumericsError(
                    f"{where}: similarity {value:.4g} ({given}); allowed: 0 to 1; use normalisation 'self'"
                )
            similarity[i, j] = similarity[j, i] = value
    return similarity


def _check_neighbours(n: int, neighbours: int) -> None:
    if neighbours < 1:
        raise RecipeError(f"neighbours is {neighbours}; allowed: 1 or more")
    if neighbours >= n:
        raise NumericsError(
            f"{neighbours} neighbours among {n} samples; allowed: fewer neighbours than samples; give more samples"
        )
