"""ReplaceMe: delete one block of layers and let a linear map of the MLP output before it stand in for it.

Source: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
arXiv 2505.02819, in its least-squares form. The block of n layers whose two ends have the least mean cosine distance
goes. With M the MLP output of the layer before it, A the residual stream after that layer's attention, and Y the stream
after the block in the base (rows are tokens)::

    T = argmin ||M T - (Y - A)||^2 + a ||T - I||^2      W_down <- T^T W_down

Where this departs from the source:

- The ridge draws towards I, which leaves the layer as it is, and not towards 0; a is ``ridge`` times the mean diagonal
  of M^T M. ``ridge: 0`` is the plain least squares of the source. Few channels with massive activations own that mean
  (on SmolLM2-135M it is 400 times the median), so a useful ridge is small.
- Padding enters no sum.
- Behind a post-norm (Gemma) no matrix can be folded: T is diagonal there and goes into the norm's gains.
- The first layer always stays: something has to be in front of the cut, as in the source.

Distances are of each text's last token, as in the source (with ``pooling: mean``, of the mean vectors).
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
    """Settings of ReplaceMe."""

    ridge: float = Field(1e-5, ge=0, description="Pull of the map towards identity, relative; 0: plain least squares")


def fit(evidence: CutEvidence, plan: MergePlan, settings: Settings) -> Folds:
    """Fit T at every cut that has a layer before it."""
    gram: dict[Cut, np.ndarray] = {}
    cross: dict[Cut, np.ndarray] = {}
    for cut, tokens in evidence.stream():
        if tokens.mlp is None:
            continue
        target = tokens.leaving - (tokens.entering - tokens.mlp)
        gram[cut] = gram.get(cut, 0.0) + tokens.mlp.T @ tokens.mlp
        cross[cut] = cross.get(cut, 0.0) + tokens.mlp.T @ target
    folds: dict[str, np.ndarray] = {}
    for cut in gram:
        folds |= fold_output_map(cut.position - 1, evidence.family, gram[cut], cross[cut], settings.ridge)
    return folds


METHOD = Method(
    name="replaceme",
    summary="Delete one block of layers; a linear map fitted by least squares stands in for it, folded",
    label="ReplaceMe, one block of layers deleted, its linear stand-in folded into the layer before it",
    source="arXiv 2505.02819",
    settings=Settings,
    decide=partial(delete_scored_block, kept=1),
    fewest=partial(count_kept, kept=1),
    needs=lambda settings: frozenset({HIDDEN_STATES}),
    score=partial(score_cosine, method="replaceme"),
    plan_settings=frozenset({"ridge"}),
    fit=fit,
)
