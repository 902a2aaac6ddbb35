"""Rounding of a weight column by column, each making up for what the ones before it did to the output.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323. For inputs x with second moments ``H = sum_t x_t x_t^T`` a rounded row q costs
``(w - q) H (w - q)^T`` beyond the row w that fits them best. Column j is rounded, and the columns behind it take over
its error: ``w_k -= (w_j - q_j) U_jk / U_jj``, with U the upper Cholesky factor of the inverse of H (`round_columns`).

A row that shall give, of inputs x, what another row gave of other inputs (asymmetric calibration: Li et al., GPTAQ,
arXiv 2504.02692), costs the same form around its own least-squares fit, a constant apart. So the caller moves the
weight to that fit first, and one procedure rounds for both.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mka.errors import NumericsError
from mka.transforms.formats import scale_groups

# Share of the mean energy of an input that every input is given: a matrix that few tokens made is not regular.
DAMPING = 0.01
# Columns that are rounded before the ones behind them are told; speed alone depends on it.
BLOCK = 128
# Rows of a matrix that stand for all when its rounding is measured.
ROWS = 128
# Scales that are tried, as shares of the one that reaches a group's largest weight.
SHRINKS = tuple(1.0 - 0.025 * step for step in range(21))


def fit_scales(weight: torch.Tensor, energy: torch.Tensor, scheme: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the scale of each group that rounding to the nearest loses least with, (R, G) or (R, 1).

    A smaller scale rounds most weights finer and clips the largest. Weights count by the energy of their inputs.

    Args:
        weight: (R, F) float32.
        energy: of each input, the diagonal of H, (F,).
        scheme: of compressed-tensors.
        dtype: scales are stored in; the ones returned are such numbers.
    """
    largest = scale_groups(weight, scheme).float()  # (R, G)
    grouped = weight.unflatten(-1, (largest.shape[1], -1))  # (R, G, F / G)
    counted = energy.to(weight.dtype).unflatten(-1, (largest.shape[1], -1))  # (G, F / G)
    best, least = largest, torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        scale = (largest * shrink).to(dtype).float()
        lost = (grouped - round_to(grouped, scale[..., None], scheme)).square().mul(counted).sum(-1)  # (R, G)
        better = lost < least
        best, least = torch.where(better, scale, best), torch.where(better, lost, least)
    return best


def measure_noise(weights: Sequence[torch.Tensor], schemes: Sequence[Any]) -> list[float]:
    """Return the relative squared error of weights rounded to the nearest under each scheme, on a sample of rows.

    Args:
        weights: (R, F) each, rounded alike; the error is that of all.
        schemes: of compressed-tensors, K of them.
    """
    sampled = [weight[:: max(1, len(weight) // ROWS)].float() for weight in weights]
    total = sum(float(rows.square().sum()) for rows in sampled) or 1.0
    found = []
    for scheme in schemes:
        lost = 0.0
        for rows in sampled:
            scale = fit_scales(rows, torch.ones(rows.shape[1]), scheme, torch.float32)
            grouped = rows.unflatten(-1, (scale.shape[1], -1))
            lost += float((grouped - round_to(grouped, scale[..., None], scheme)).square().sum())
        found.append(lost / total)
    return found


def round_to(weight: torch.Tensor, scale: torch.Tensor, scheme: Any) -> torch.Tensor:
    """Round weights to the nearest multiples of their scales that the scheme has numbers for."""
    half = 1 << (scheme.weights.num_bits - 1)
    # A scale of zero belongs to weights that are all zero.
    return (weight / scale.where(scale > 0, 1.0)).round().clamp(-half, half - 1) * scale


def round_columns(weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, scheme: Any) -> torch.Tensor:
    """Round a weight so that its output on inputs of these moments changes least; returns it, (R, F) float32.

    The inputs of most energy come first, while there are many left to make up for them.

    Args:
        weight: (R, F) float32, what the output would be best with.
        gram: H, (F, F) float64.
        scale: of each group of columns, (R, G), or of each row, (R, 1).
        scheme: of compressed-tensors.

    Raises:
        NumericsError: if moments are not finite, or not positive definite.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = _factorise_inverse(gram[order][:, order]).to(weight.dtype)  # (F, F)
    columns = weight.shape[1]
    scales = scale.repeat_interleave(columns // scale.shape[1], dim=1)[:, order]  # (R, F)
    left, rounded = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty_like(left[:, start:end])
        for j in range(start, end):
            rounded[:, j] = round_to(left[:, j], scales[:, j], scheme)
            error = (left[:, j] - rounded[:, j]) / upper[j, j]
            left[:, j:end] -= error[:, None] * upper[j, j:end]
            errors[:, j - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    return rounded[:, torch.argsort(order)]


def _factorise_inverse(gram: torch.Tensor) -> torch.Tensor:
    """Return U with ``U^T U`` the inverse of the damped moments, upper triangular, (F, F) float64."""
    if not bool(gram.sum().isfinite()):
        raise NumericsError("rounding: inputs of a layer are NaN or infinite")
    system = gram.clone()
    # Inputs that never fire have no energy at all, where no other has either.
    system.diagonal().add_(DAMPING * gram.diagonal().mean() + 1e-30)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise NumericsError("rounding: the moments of a layer's inputs are not positive definite; give more tokens")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
