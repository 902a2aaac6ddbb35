"""Grids that lose least of a standard normal number, or of pairs of them. Pure.

Source: Lloyd, "Least squares quantization in PCM", 1982, and Max, "Quantizing for minimum distortion", 1960; as the
grids of HIGGS (Malinovskii et al., arXiv 2411.17525).
"""

from functools import cache

import numpy as np
from scipy.stats import norm, qmc

# Lloyd's iterations; grids of up to 16 points move by less than 1e-9 at the end.
STEPS = 20_000
SETTLED = 1e-12
# Normal pairs that grids of pairs are fitted on, and iterations over them.
SAMPLES, PAIR_STEPS = 1 << 16, 60


@cache
def fit_scalars(bits: int) -> np.ndarray:
    """Return the ``2^bits`` numbers, in order, that rounding to the nearest loses least of a standard normal with."""
    points: np.ndarray = norm.ppf((np.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(STEPS):
        edges = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
        # The mean of a standard normal between two edges.
        moved = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
        settled = np.abs(moved - points).max() < SETTLED
        points = moved
        if settled:
            break
    return points


@cache
def fit_pairs(bits: int) -> np.ndarray:
    """Return ``4^bits`` points of the plane, (4^bits, 2), for pairs of standard normals: as many bits per number.

    From the grid of all pairs of `fit_scalars`, by Lloyd's iterations on a fixed sample.
    """
    from scipy.cluster.vq import kmeans2

    scalars = fit_scalars(bits)
    start = np.stack(np.meshgrid(scalars, scalars, indexing="ij"), axis=-1).reshape(-1, 2)
    # The grid of all pairs is a saddle: a little off it, iterations leave it.
    start += 0.05 * np.random.default_rng(0).standard_normal(start.shape)
    sample = norm.ppf(qmc.Sobol(2, seed=0).random(SAMPLES))
    points, _ = kmeans2(sample, start, iter=PAIR_STEPS, minit="matrix")
    return np.asarray(points)
