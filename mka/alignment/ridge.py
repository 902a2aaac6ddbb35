"""Weighted ridge regression from second moments.

``W = argmin sum_t w_t |phi_t W - r_t|^2 + sum_j p_j |W_j - W0_j|^2`` has the closed form
``W = W0 + (G + P)^-1 (C - G W0)`` with ``G = sum_t w_t phi_t phi_t^T`` and ``C = sum_t w_t phi_t r_t^T``.

The penalty of feature j is ``p_j = penalty * sqrt(G_jj * mean(G_jj))``, half way between one constant for all (which
crushes weak features beside massive ones) and one proportional to each feature's own energy (which shrinks them alike).
"""

import torch

from mka.errors import NumericsError


class Moments:
    """Second moments of features (F wide) and targets (D wide), summed in float64.

    Attributes:
        gram: G, (F, F).
        cross: C, (F, D).
    """

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        """Start from zero."""
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features, targets, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens: features (n, F), targets (n, D), weights (n,); products in the features' precision."""
        weighted = features if weights is None else features * weights[:, None]
        self.gram += weighted.T @ features
        self.cross += weighted.T @ targets

    def take(self, columns: torch.Tensor) -> "Moments":
        """Return the moments of some features, (F',) int64."""
        taken = object.__new__(Moments)
        taken.gram, taken.cross = self.gram[columns][:, columns], self.cross[columns]
        return taken


def fit_ridge(moments: Moments, prior: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return W, (F, D) float64.

    Args:
        moments: of features and targets.
        prior: W0, (F, D).
        penalty: relative to the features' energies, > 0.

    Raises:
        NumericsError: if the moments are not finite.
    """
    prior = prior.double()
    _refuse_not_finite(moments)
    factor = _factorise(moments.gram, penalty * _penalty_scale(moments.gram))
    return prior + torch.cholesky_solve(moments.cross - moments.gram @ prior, factor)


def _refuse_not_finite(moments: Moments) -> None:
    if not bool(moments.gram.sum().isfinite()) or not bool(moments.cross.sum().isfinite()):
        raise NumericsError("a fit's features or targets are NaN or infinite")


def _factorise(gram: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
    """Return the Cholesky factor of G + P; each matrix of this size counts, they are the largest there are."""
    system = gram.clone()
    system.diagonal().add_(penalties)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise NumericsError("a fit's moments are not positive definite; give more tokens or a larger penalty")
    return factor


def _penalty_scale(gram: torch.Tensor) -> torch.Tensor:
    energy = gram.diagonal()
    mean = energy.mean()
    # A feature that never fires has no energy; it still needs a penalty for the system to be regular.
    return torch.sqrt((energy + 1e-6 * mean + 1e-30) * (mean + 1e-30))


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

    Raises:
        NumericsError: if the moments are not finite.
    """
    _refuse_not_finite(moments)
    gram, cross, prior = moments.gram, moments.cross, prior.double()
    scale = penalty * _penalty_scale(gram)
    alive = torch.unique(units)
    excess = len(alive) - keep
    for done in range(rounds):
        drop = excess * (done + 1) // rounds - excess * done // rounds
        if drop <= 0:
            continue
        columns = torch.isin(units, alive).nonzero().squeeze(1)
        inverse = torch.cholesky_inverse(_factorise(gram[columns][:, columns], scale[columns]))
        weight = inverse @ (cross[columns] + scale[columns, None] * prior[columns])
        rise = weight.square().sum(1) / inverse.diagonal()
        per_unit = torch.zeros(int(units.max()) + 1, dtype=rise.dtype, device=rise.device)
        per_unit.index_add_(0, units[columns], rise)
        order = torch.argsort(per_unit[alive], stable=True)
        alive = alive[order[drop:]].sort().values
    return alive
