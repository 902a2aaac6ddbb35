"""Prune&Comp: delete layers by Block Influence and make up for the magnitude that went with them.

Source: Chen et al., "Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with Magnitude Compensation",
arXiv 2507.18212. At every cut, with X the residual stream that enters it and Y the one that leaves it in the base::

    s = mean over channels c of  E|Y_c| / E|X_c|

The stream before the cut is multiplied by s, by scaling what is written to it: the embedding, and o_proj and down_proj
of the kept layers up to the cut; of several cuts, scales multiply. RMSNorm reads are free of scale (up to their
epsilon), so those layers compute what they did. A head that is the embedding would be scaled too: the final norm's gain
is divided by the product of all scales, which is exact. Behind a post-norm (Gemma) the norm's gain is scaled in place
of the matrix.

One-shot: layers are chosen and scales measured on the base. The source's iterative variant, which measures both again
after every compensated deletion, is not here.
"""

from functools import partial

import numpy as np

from mka.evidence.cuts import Cut, CutEvidence
from mka.evidence.needs import HIDDEN_STATES
from mka.methods import Method
from mka.plan.plan import MergePlan
from mka.sections import Section
from mka.similarity.blocks import delete_scored_layers, score_influence
from mka.transforms.fold import Folds, fold_scales


class Settings(Section):
    """Prune&Comp has no settings."""


def compare_magnitudes(entering: np.ndarray, leaving: np.ndarray) -> float:
    """Return s from E|X_c| and E|Y_c| (or their sums over the same tokens), (D,) each."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean(leaving / entering))


def fit(evidence: CutEvidence, plan: MergePlan, settings: Settings) -> Folds:
    """Measure the scale of every cut in the base; one at the very start scales the embedding alone."""
    entering: dict[Cut, np.ndarray] = {}
    leaving: dict[Cut, np.ndarray] = {}
    for cut, tokens in evidence.stream():
        entering[cut] = entering.get(cut, 0.0) + np.abs(tokens.entering).sum(axis=0)
        leaving[cut] = leaving.get(cut, 0.0) + np.abs(tokens.leaving).sum(axis=0)
    scales = {cut.position: compare_magnitudes(entering[cut], leaving[cut]) for cut in evidence.cuts}
    return fold_scales(scales, evidence.family, tied=evidence.tied)


METHOD = Method(
    name="prune_and_comp",
    summary="Delete the layers with the least Block Influence; scale the stream before each cut, folded",
    label="Prune&Comp, layers deleted by Block Influence, magnitudes compensated at every cut",
    source="arXiv 2507.18212",
    settings=Settings,
    decide=delete_scored_layers,
    needs=lambda settings: frozenset({HIDDEN_STATES}),
    score=partial(score_influence, method="prune_and_comp"),
    fit=fit,
)
