"""Weighted ridge regression from second moments, its penalty chosen on sources that were left out of the fit.

``W = argmin sum_t w_t |phi_t W - r_t|^2 + sum_j p_j |W_j - W0_j|^2`` has the closed form
``W = W0 + (G + P)^-1 (C - G W0)`` with ``G = sum_t w_t phi_t phi_t^T`` and ``C = sum_t w_t phi_t r_t^T``.

The penalty of feature j is ``p_j = penalty * sqrt(G_jj * mean(G_jj))``, half way between one constant for all (which
crushes weak features beside massive ones) and one proportional to each feature's own energy (which shrinks them alike).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mka.errors import NumericsError

PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)


class Moments:
    """Second moments of features (F wide) and targets (D wide), summed in float64 and kept apart by fold.

    Attributes:
        gram: G of each fold, (folds, F, F).
        cross: C of each fold, (folds, F, D).
    """

    def __init__(self, folds: int, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        """Start from zero."""
        self.gram = torch.zeros(folds, features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(folds, features, targets, dtype=torch.float64, device=device)

    def add(
        self, fold: int, features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """Add tokens to a fold: features (n, F), targets (n, D), weights (n,); products in the features' precision."""
        weighted = features if weights is None else features * weights[:, None]
        self.gram[fold] += (weighted.T @ features).double()
        self.cross[fold] += (weighted.T @ targets).double()


@dataclass(frozen=True)
class Ridge:
    """A fit.

    Attributes:
        weight: W, (F, D) float64.
        penalty: the one chosen.
        heldout: penalty -> held-out squared error relative to that of W0; empty if nothing was held out.
    """

    weight: torch.Tensor
    penalty: float
    heldout: dict[float, float]


def fit_ridge(
    moments: Moments, prior: torch.Tensor, penalties: Sequence[float] = PENALTIES, total: float | None = None
) -> Ridge:
    """Fit with the penalty that predicts left-out folds best, then fit on all folds.

    The held-out figure is the change of the squared error against the prior W0,
    ``sum_folds tr(E^T G_f E) - 2 tr(E^T (C_f - G_f W0))`` with E = W - W0 fitted without fold f: negative is better.

    Args:
        moments: of features and targets.
        prior: W0, (F, D).
        penalties: those tried; one alone is used as it is.
        total: weighted squared error of W0, to report held-out errors relative to it; None leaves the difference.

    Raises:
        NumericsError: if the moments are not finite.
    """
    gram, cross, prior = moments.gram.sum(0), moments.cross.sum(0), prior.double()
    if not bool(gram.diagonal().isfinite().all()) or not bool(cross.isfinite().all()):
        raise NumericsError("alignment: features or targets are NaN or infinite")
    residual = moments.cross - moments.gram @ prior
    scale = _penalty_scale(gram)
    heldout: dict[float, float] = {}
    if len(penalties) > 1 and len(moments.gram) > 1:
        for penalty in penalties:
            change = 0.0
            for own_gram, own_residual in zip(moments.gram, residual):
                step = _solve(gram - own_gram, residual.sum(0) - own_residual, penalty * scale)
                change += float((step * (own_gram @ step - 2 * own_residual)).sum())
            heldout[penalty] = change if total is None else 1.0 + change / total
    chosen = min(heldout, key=heldout.__getitem__) if heldout else penalties[len(penalties) // 2]
    return Ridge(prior + _solve(gram, residual.sum(0), chosen * scale), chosen, heldout)


def _penalty_scale(gram: torch.Tensor) -> torch.Tensor:
    energy = gram.diagonal()
    mean = energy.mean()
    # A feature that never fires has no energy; it still needs a penalty for the system to be regular.
    return torch.sqrt((energy + 1e-6 * mean + 1e-30) * (mean + 1e-30))


def _solve(gram: torch.Tensor, residual: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(penalty))
    if int(failed):
        raise NumericsError("alignment: the moments are not positive definite; give more tokens or a larger penalty")
    return torch.cholesky_solve(residual, factor)


def select_features(
    moments: Moments, prior: torch.Tensor, units: torch.Tensor, keep: int, *, penalty: float = 1.0, rounds: int = 6
) -> torch.Tensor:
    """Choose the units whose features predict the targets best together, by backward elimination.

    Removing feature j from the fit and refitting the others raises the objective by ``|W_j|^2 / (A^-1)_jj``, with
    ``A = G + P`` (Optimal Brain Surgeon, Hassibi & Stork 1993, eq. 5, for a row of a least-squares problem). Units of
    several features (attention heads) are charged the sum. The least useful go in ``rounds`` steps, refit between.

    Args:
        moments: of all features, (F, F) and (F, D).
        prior: W0, (F, D).
        units: unit each feature belongs to, (F,) int64.
        keep: units to keep.
        penalty: as in `fit_ridge`.
        rounds: refits on the way.

    Returns:
        The units kept, rising, (keep,) int64.
    """
    gram, cross, prior = moments.gram.sum(0), moments.cross.sum(0), prior.double()
    scale = penalty * _penalty_scale(gram)
    alive = torch.unique(units)
    excess = len(alive) - keep
    for done in range(rounds):
        drop = excess * (done + 1) // rounds - excess * done // rounds
        if drop <= 0:
            continue
        columns = torch.isin(units, alive).nonzero().squeeze(1)
        system = gram[columns][:, columns] + torch.diag(scale[columns])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
        weight = inverse @ (cross[columns] + scale[columns, None] * prior[columns])
        rise = weight.square().sum(1) / inverse.diagonal()
        per_unit = torch.zeros(int(units.max()) + 1, dtype=rise.dtype, device=rise.device)
        per_unit.index_add_(0, units[columns], rise)
        order = torch.argsort(per_unit[alive], stable=True)
        alive = alive[order[drop:]].sort().values
    return alive
