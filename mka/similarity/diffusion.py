"""Diffusion maps: hidden states of N samples become K coordinates on their manifold. numpy and scipy only.

Sources: Coifman & Lafon, "Diffusion maps", ACHA 21 (2006), for the kernel, the density normalisation and the
coordinates; MKA (arXiv 2406.16330) for their use on layers, whose released code has exponent 0.5 and sigma 8.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist, squareform

from mka.errors import NumericsError, RecipeError

Array = NDArray[np.float64]

# The typical sample must feel its nearest neighbour beside its own 1 on the diagonal. The median over all pairs is no
# such test: it may be tiny where a narrow kernel still links every sample to its neighbours.
NEAREST_MINIMUM = 1e-12
# Above this, what tells samples apart (1 - K) keeps fewer than seven significant digits of float64.
MEDIAN_MAXIMUM = 1.0 - 1e-9
# An eigenvalue this close to 1 is a second connected component, one this small is rounding: in both cases the
# eigenvector is arbitrary.
EIGENVALUE_RANGE = (1e-12, 1.0 - 1e-10)


@dataclass(frozen=True)
class DiffusionMap:
    """The diffusion coordinates of one point set.

    Coordinates are fixed up to the sign of each column and, where eigenvalues coincide, up to a rotation of the
    columns they belong to.

    Attributes:
        coordinates: (N, K), ``psi_k = u_k / u_0`` for k = 1..K, in order of falling eigenvalue.
        eigenvalues: (K+1,), falling; the first is 1.
        bandwidth: sigma, in units of the data.
        kernel_median: median of the kernel over distinct pairs; 0.05 to 0.95 is healthy.
    """

    coordinates: Array
    eigenvalues: Array
    bandwidth: float
    kernel_median: float


def check_points(x: ArrayLike, what: str) -> Array:
    """Return ``x`` as float64 of shape (N, D) with N >= 2 and D >= 1.

    Args:
        x: the candidate array.
        what: how the message names it.

    Raises:
        NumericsError: if the shape is another one, or a value is NaN or infinite.
    """
    points = np.asarray(x, dtype=np.float64)
    if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] < 1:
        raise NumericsError(
            f"{what}: got shape {points.shape}; allowed: (samples >= 2, dimensions >= 1); "
            "pool each sample to one vector"
        )
    finite = np.isfinite(points)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=1))
        raise NumericsError(
            f"{what}: {int(np.count_nonzero(~finite))} values of shape {points.shape} are NaN or infinite, "
            f"first in sample {bad[0]}; allowed: finite numbers; check the forward pass and its dtype"
        )
    return points


def pairwise_distances(x: ArrayLike) -> Array:
    """Euclidean distances between all samples, (N, D) -> (N, N), symmetric with a zero diagonal.

    Raises:
        NumericsError: if ``x`` is not a finite (N, D) array with N >= 2.
    """
    return squareform(pdist(check_points(x, "pairwise distances")))


def diffusion_map(
    x: ArrayLike,
    *,
    coordinates: int = 2,
    exponent: float = 2.0,
    bandwidth: float | Literal["median"] = "median",
    alpha: float = 0.5,
) -> DiffusionMap:
    """Embed N samples in K diffusion coordinates.

    With D the distances, ``K = exp(-(D / sigma)^p)``, ``K1 = K / (q q^T)^alpha`` with q the row sums of K,
    ``A = K1 / (v v^T)`` with v^2 the row sums of K1, and ``A u_k = lambda_k u_k``: ``psi_k = u_k / u_0``.

    Args:
        x: (N, D), one row per sample.
        coordinates: K >= 1, at most N - 1.
        exponent: p in (0, 2], where the kernel is positive definite; 2 is Coifman & Lafon's.
        bandwidth: sigma > 0 in units of the data, or "median": the median distance of distinct pairs.
        alpha: in [0, 1], how much of the sampling density is divided out: 0 nothing, 1 all.

    Raises:
        RecipeError: if an option is outside its range.
        NumericsError: if ``x`` is not a finite (N, D) array, N is too small for K, or the kernel is degenerate:
            all but diagonal, all but constant, in disconnected parts, or of too low a rank for K coordinates.
    """
    _check_options(coordinates, exponent, bandwidth, alpha)
    distances = pairwise_distances(x)
    n = len(distances)
    if n < coordinates + 1:
        raise NumericsError(
            f"diffusion map: {n} samples for {coordinates} coordinates; allowed: at least {coordinates + 1} samples; "
            "give more samples or ask for fewer coordinates"
        )
    pairs = squareform(distances, checks=False)
    sigma = float(np.median(pairs)) if bandwidth == "median" else float(bandwidth)
    if sigma == 0.0:
        raise NumericsError(
            f"diffusion map: the median distance of {n} samples is 0, so the median bandwidth is 0; allowed: at most "
            "half of the pairs identical; drop repeated samples or give a bandwidth"
        )
    # A distance far beyond sigma underflows to 0, its limit.
    with np.errstate(under="ignore", over="ignore"):
        kernel = np.exp(-((distances / sigma) ** exponent))
    kernel_median = float(np.median(squareform(kernel, checks=False)))
    nearest = float(np.median(np.partition(kernel, n - 2, axis=1)[:, n - 2]))
    chosen = f"sigma {sigma:.6g}, exponent {exponent:g} and median distance {float(np.median(pairs)):.6g}"
    if nearest < NEAREST_MINIMUM:
        raise NumericsError(
            f"diffusion map: the kernel is the identity: {nearest:.3g} between the typical sample and its nearest "
            f"with {chosen}; allowed: {NEAREST_MINIMUM:g} or more; use bandwidth 'median' or one near that distance"
        )
    if kernel_median > MEDIAN_MAXIMUM:
        raise NumericsError(
            f"diffusion map: the kernel is all ones: off-diagonal median 1 - {1.0 - kernel_median:.1g} with {chosen}; "
            "allowed: at most 1 - 1e-09; use bandwidth 'median' or one near the median distance, drop repeated samples"
        )

    density = kernel.sum(axis=1) ** alpha
    kernel /= np.outer(density, density)
    root = np.sqrt(kernel.sum(axis=1))
    kernel /= np.outer(root, root)
    values, vectors = eigh(kernel, subset_by_index=(n - 1 - coordinates, n - 1))
    if len(values) < coordinates + 1:
        # LAPACK counts eigenvalues by bisection and can lose some of many equal ones.
        values, vectors = (part[..., -coordinates - 1 :] for part in eigh(kernel))
    values, vectors = values[::-1].copy(), vectors[:, ::-1]
    low, high = EIGENVALUE_RANGE
    if values[1] > high:
        raise NumericsError(
            f"diffusion map: second eigenvalue {values[1]:.12g} with {chosen}: the samples fall into parts that do not "
            f"see each other{_outside_largest_part(kernel, 1.0 - high)}; allowed: at most 1 - 1e-10; "
            "use a smaller exponent or a larger bandwidth, or drop those samples"
        )
    if values[-1] < low:
        usable = int(np.count_nonzero(values[1:] >= low))
        raise NumericsError(
            f"diffusion map: only {usable} of {coordinates} coordinates stand above rounding (eigenvalue "
            f"{values[-1]:.3g}) with {chosen}; allowed: eigenvalues of at least {low:g}; "
            "ask for fewer coordinates or use a smaller bandwidth"
        )
    return DiffusionMap(vectors[:, 1:] / vectors[:, :1], values, sigma, kernel_median)


def _outside_largest_part(affinity: Array, link: float) -> str:
    """Name the samples that no chain of links of at least ``link`` ties to the largest part, (N, N) -> message."""
    labels = connected_components(affinity >= link, directed=False)[1]
    outside = np.flatnonzero(labels != np.bincount(labels).argmax())
    if not len(outside):
        return ""
    listed = ", ".join(map(str, outside[:5])) + (", ..." if len(outside) > 5 else "")
    return f" (outside the largest part: {len(outside)} of {len(labels)} samples: {listed})"


def _check_options(coordinates: int, exponent: float, bandwidth: float | Literal["median"], alpha: float) -> None:
    if coordinates < 1:
        raise RecipeError(f"diffusion map: coordinates is {coordinates}; allowed: 1 or more")
    if not 0.0 < exponent <= 2.0:
        raise RecipeError(f"diffusion map: exponent is {exponent}; allowed: above 0, at most 2")
    if not 0.0 <= alpha <= 1.0:
        raise RecipeError(f"diffusion map: alpha is {alpha}; allowed: 0 to 1")
    if bandwidth != "median" and (isinstance(bandwidth, str) or not 0.0 < bandwidth < np.inf):
        raise RecipeError(f"diffusion map: bandwidth is {bandwidth!r}; allowed: a number above 0, or 'median'")
