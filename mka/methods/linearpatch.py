"""LinearPatch: delete one block of layers and match the residual stream's magnitudes across the cut.

Source: Chen et al., "A Simple Linear Patch Revives Layer-Pruned Large Language Models", arXiv 2505.24680. The block of
n layers whose two ends have the least mean cosine distance goes. With X the residual stream that enters it and Y the
one that leaves it in the base (rows are tokens), the source multiplies the stream at the cut by::

    P = Q diag(s) Q^T,    s_k = E|(Y Q)_k| / E|(X Q)_k|,    Q orthogonal

Where this departs from the source:

- A stock folder has no place for a (D, D) product on the residual stream. The patched stream is fitted instead, through
  the MLP output M of the layer before the cut; A is the stream after that layer's attention::

      T = argmin ||M T - (X P - A)||^2 + a ||T - I||^2      W_down <- T^T W_down

  with a = ``ridge`` times the mean diagonal of M^T M. Behind a post-norm (Gemma) T is diagonal and goes into its gains.
- Q is the Hadamard matrix where D is a power of two. Elsewhere D = 2^k m with m odd, and Q is the Kronecker product of
  the Hadamard matrix of order 2^k and the orthonormal DCT-II of order m.
- s is the ratio of means over all tokens; the released program averages the ratios of single texts.
- Distances are of each text's last token (with ``pooling: mean``, of the mean vectors); the released program takes all
  tokens. The first layer always stays, as it does there.
"""

from functools import partial

import numpy as np
from pydantic import Field

from mka.evidence.cuts import Cut, CutEvidence
from mka.evidence.needs import HIDDEN_STATES
from mka.methods import Method
from mka.plan.plan import MergePlan
from mka.sections import Section
from mka.similarity.blocks import count_kept, delete_scored_block, score_cosine
from mka.transforms.fold import Folds, fold_output_map


class Settings(Section):
    """Settings of LinearPatch."""

    ridge: float = Field(1e-5, ge=0, description="Pull of the folded map towards identity, relative; 0: none")


def rotate_channels(width: int) -> np.ndarray:
    """Return the orthogonal Q, (D, D) float64: Hadamard of the largest power of two in D, kron DCT-II of the rest."""
    from scipy.fft import dct
    from scipy.linalg import hadamard

    power = width & -width
    return np.kron(hadamard(power) / np.sqrt(power), dct(np.eye(width // power), norm="ortho", axis=0))


class PatchSums:
    """Sums over tokens from which a patch and its fold follow; rows of all arrays are tokens."""

    def __init__(self, width: int) -> None:
        self.rotation = rotate_channels(width)
        self.entering, self.leaving = np.zeros(width), np.zeros(width)
        self.gram, self.across = np.zeros((width, width)), np.zeros((width, width))

    def add(self, entering: np.ndarray, leaving: np.ndarray, mlp: np.ndarray) -> None:
        """Add tokens: X, Y and M, (n, D) float64 each."""
        self.entering += np.abs(entering @ self.rotation).sum(axis=0)
        self.leaving += np.abs(leaving @ self.rotation).sum(axis=0)
        self.gram += mlp.T @ mlp
        self.across += mlp.T @ entering

    @property
    def scales(self) -> np.ndarray:
        """The s of the source, (D,): mean magnitude of each rotated channel after the block over that before it."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.leaving / self.entering

    @property
    def patch(self) -> np.ndarray:
        """The P of the source, (D, D)."""
        return (self.rotation * self.scales) @ self.rotation.T

    @property
    def cross(self) -> np.ndarray:
        """M^T (X P - A), (D, D): A = X - M, so it is M^T X P - M^T X + M^T M."""
        return self.across @ self.patch - self.across + self.gram


def fit(evidence: CutEvidence, plan: MergePlan, settings: Settings) -> Folds:
    """Fit the fold of the patch at every cut that has a layer before it."""
    sums: dict[Cut, PatchSums] = {}
    for cut, tokens in evidence.stream():
        if tokens.mlp is not None:
            sums.setdefault(cut, PatchSums(tokens.mlp.shape[1])).add(tokens.entering, tokens.leaving, tokens.mlp)
    folds: dict[str, np.ndarray] = {}
    for cut, found in sums.items():
        folds |= fold_output_map(cut.position - 1, evidence.family, found.gram, found.cross, settings.ridge)
    return folds


METHOD = Method(
    name="linearpatch",
    summary="Delete one block of layers; match channel magnitudes across the cut, patch folded by least squares",
    label="LinearPatch, patch folded by least squares",
    source="arXiv 2505.24680",
    settings=Settings,
    decide=partial(delete_scored_block, kept=1),
    fewest=partial(count_kept, kept=1),
    needs=lambda settings: frozenset({HIDDEN_STATES}),
    score=partial(score_cosine, method="linearpatch"),
    plan_settings=frozenset({"ridge"}),
    fit=fit,
)
