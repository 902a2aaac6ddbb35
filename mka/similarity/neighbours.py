"""Distances to nearest neighbours and counts of nearer samples, for many pairs of layers. numpy and scipy only."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.special import digamma

from mka.errors import NumericsError
from mka.similarity.diffusion import Array

# Distances held at a time while neighbours are counted: 2 MiB as int32, so a block stays in the cache.
_BLOCK = 1 << 19

# Listing a layer's nearest samples takes as long as searching about so many pairs without the list.
_LISTING_PAYS = 10

# The longest list: reading one that is much longer takes as long as searching.
_LISTED = 256


def neighbour_distances(points: Array, neighbours: int, what: str, norm: float = np.inf) -> Array:
    """Distance of each sample to its k-th other sample, (N, K) -> (N,), refused where it is 0."""
    # The first neighbour a tree finds is the sample itself.
    radii = KDTree(points).query(points, k=[neighbours + 1], p=norm)[0][:, 0]
    _refuse_coincident(radii, neighbours, what)
    return radii


def _refuse_coincident(radii: NDArray[Any], neighbours: int, what: str) -> None:
    coincident = int(np.count_nonzero(radii == 0))
    if coincident:
        raise NumericsError(
            f"{what}: {coincident} of {len(radii)} samples coincide with {neighbours} or more others; allowed: fewer "
            "identical samples than neighbours; drop repeated samples or raise neighbours"
        )


def fill_row(
    radii: NDArray[np.int32], i: int, ranks: Sequence[NDArray[np.int32]], names: Sequence[str], neighbours: int
) -> None:
    """Write the distance of each sample to its k-th other sample in layer i, and in layer i joined with each later one.

    Args:
        radii: (L, L, N), written at [i, j] and [j, i] for j >= i.
        i: the row.
        ranks: L arrays (N, K) of doubled ranks.
        names: of the layers.
        neighbours: k.

    Raises:
        NumericsError: if a distance is 0 in layer i; a joint one cannot be where that one is not.
    """
    first, n = ranks[i], len(ranks[i])
    # Even where two layers are unrelated, only about sqrt(k n) samples of either are nearer than the k-th joint one.
    listed = min(math.isqrt(3 * neighbours * n // 2), _LISTED, n - 1) if len(ranks) - i > _LISTING_PAYS else neighbours
    distances, nearest = KDTree(first).query(first, k=max(listed, neighbours) + 1, p=np.inf)
    distances = distances.astype(np.int32)
    radii[i, i] = distances[:, neighbours]
    _refuse_coincident(radii[i, i], neighbours, f"NPIB, {names[i]}")
    for j in range(i + 1, len(ranks)):
        radii[i, j] = radii[j, i] = _joint_distances(first, ranks[j], distances, nearest, neighbours)


def _joint_distances(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    distances: NDArray[np.int32],
    nearest: NDArray[np.intp],
    neighbours: int,
) -> NDArray[np.int32]:
    """Distance of each sample to its k-th other sample in (first, second), found among the nearest in first if it can.

    Args:
        first: (N, K).
        second: (N, K').
        distances: (N, M), rising, of each sample in ``first`` to the M nearest there, which include itself.
        nearest: (N, M), which samples these are.
        neighbours: k, below M.

    Returns:
        (N,).
    """
    joint = distances.copy()
    for coordinate in second.T:
        np.maximum(joint, np.abs(coordinate.take(nearest) - coordinate[:, None]), out=joint)
    joint.partition(neighbours, axis=1)
    radii = joint[:, neighbours].copy()
    # What is not on the list is no nearer than the end of the list in first, and no nearer jointly than in first.
    unsure = np.flatnonzero(radii > distances[:, -1])
    if len(unsure):
        both = np.hstack([first, second])
        radii[unsure] = KDTree(both).query(both[unsure], k=[neighbours + 1], p=np.inf)[0][:, 0]
    return radii


def mean_digamma(closer: NDArray[np.intp]) -> Array:
    """Mean over samples of psi, (P, N) whole numbers from 1 to N -> (P,)."""
    return digamma(np.arange(closer.shape[1] + 1)).take(closer).mean(axis=1)


def count_closer(points: NDArray[Any], radii: NDArray[Any]) -> NDArray[np.intp]:
    """Count the samples strictly closer than a radius in max-norm, itself included: ``O(N^2 log N)``.

    Args:
        points: (N, K).
        radii: (P, N), positive, of the same dtype as ``points``.

    Returns:
        (P, N).
    """
    n = len(points)
    closer = np.empty(radii.shape, dtype=np.intp)
    rows = max(1, _BLOCK // n)
    for start in range(0, n, rows):
        block = points[start : start + rows]
        distances = np.abs(block[:, None, 0] - points[None, :, 0])  # (rows, 1) - (1, N) -> (rows, N)
        for k in range(1, points.shape[1]):
            np.maximum(distances, np.abs(block[:, None, k] - points[None, :, k]), out=distances)
        distances.sort(axis=1)
        for i, ordered in enumerate(distances, start):
            closer[:, i] = np.searchsorted(ordered, radii[:, i], side="left")
    return closer


def count_closer_in_plane(ranks: NDArray[np.int32], radii: NDArray[np.int32]) -> NDArray[np.intp]:
    """`count_closer` for two coordinates, as the samples in a square: ``O(N^1.5 + P N)``.

    Args:
        ranks: (N, 2), doubled ranks.
        radii: (P, N).

    Returns:
        (P, N).
    """
    n = len(ranks)
    by_x, by_y = np.argsort(ranks, axis=0, kind="stable").T  # (N,) each
    place = np.empty(n, dtype=np.intp)
    place[by_x] = np.arange(n)
    count_corner = _tabulate_plane(place[by_y])
    # How many samples are below each value, by coordinate. Beyond the ends it is none or all: mode "clip".
    below = [np.searchsorted(np.sort(coordinate), np.arange(2 * n + 2)) for coordinate in ranks.T]  # (2 N + 2,) each
    closer = np.empty(radii.shape, dtype=np.intp)
    rows = max(1, _BLOCK // (32 * n))
    for start in range(0, len(radii), rows):
        r = radii[start : start + rows]  # (rows, N), as are the four sides
        (left, right), (bottom, top) = (
            (table.take(at - r + 1, mode="clip"), table.take(at + r, mode="clip")) for table, at in zip(below, ranks.T)
        )
        closer[start : start + rows] = (
            count_corner(right, top)
            - count_corner(left, top)
            - count_corner(right, bottom)
            + count_corner(left, bottom)
        )
    return closer


def _tabulate_plane(order: NDArray[np.intp]) -> Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.intp]]:
    """Prepare to count samples that are left of one place and below another, ``O(N^1.5)``, each then at once.

    Args:
        order: (N,), the place from left to right of each sample, samples from bottom to top.

    Returns:
        A function of x and y in 0 to N, arrays of one shape: how many of the lowest y samples are among the leftmost x.
    """
    n = len(order)
    # Samples from bottom to top are cut into blocks of about sqrt(n).
    bits = n.bit_length() // 2
    side = 1 << bits
    block, place = np.arange(n) >> bits, np.arange(n) & (side - 1)
    # [b, x]: how many samples of the blocks before b are among the leftmost x.
    before = np.zeros(((n >> bits) + 2, n + 1), dtype=np.int32)  # (B + 1, N + 1)
    before[block + 1, order + 1] = 1
    before = before.cumsum(axis=0).cumsum(axis=1)
    # [b, w, p]: how many of the lowest p samples of block b are among the leftmost w of that block.
    within = np.zeros((len(before) - 1, side + 1, side + 1), dtype=np.int32)  # (B, side + 1, side + 1)
    within[block, before[block + 1, order] - before[block, order] + 1, place + 1] = 1
    within = within.cumsum(axis=1).cumsum(axis=2)

    def count_corner(x: NDArray[np.intp], y: NDArray[np.intp]) -> NDArray[np.intp]:
        b = y >> bits
        lower = before[b, x]
        return lower + within[b, before[b + 1, x] - lower, y & (side - 1)]

    return count_corner
