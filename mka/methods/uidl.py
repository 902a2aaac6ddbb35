"""UIDL: delete the block of layers across which hidden states turn least.

Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887. For each block of n
layers that begins with layer l, the angular distance between the hidden state x_l that enters it and the one x_{l+n}
that leaves it, at a text's last token and averaged over texts::

    d(x_l, x_{l+n}) = arccos( x_l . x_{l+n} / (|x_l| |x_{l+n}|) ) / pi        0: same direction, 1: opposite

The block with the least distance goes as a whole; n follows from the target. Deletions for two targets need not be
nested. The source's fine-tuning afterwards is not part of it. With ``pooling: mean`` it is the angle between the means
over a text's tokens instead, which is not what the source measured.
"""

import numpy as np

from mka.evidence.needs import HIDDEN_STATES, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.sections import Section
from mka.similarity.blocks import delete_scored_block, measure_blocks


class Settings(Section):
    """UIDL has no settings."""


def angular_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Angle between rows of x and y, (N, D) float64 unit vectors, as a share of pi, (N,).

    By ``2 atan2(|x - y|, |x + y|)`` (Kahan), which unlike the arccosine keeps small angles and gives 0 for equal rows.
    """
    return 2 / np.pi * np.arctan2(np.linalg.norm(x - y, axis=1), np.linalg.norm(x + y, axis=1))


def score(evidence: Evidence, settings: Settings) -> LayerScores:
    """Mean angular distance across every block of layers, (L, L): [i, j] is the block from layer i to layer j."""
    assert evidence.states is not None
    values = measure_blocks(evidence.states.pooled, angular_distance, evidence.on_progress)
    meaning = "Angular distance across a block of layers (0: same direction, 0.5: at right angles, 1: opposite)"
    return LayerScores("block-distance", values, meaning, "uidl", {})


METHOD = Method(
    name="uidl",
    summary="Delete the contiguous block of layers across which hidden states turn least",
    label="UIDL, one block of layers deleted by angular distance",
    source="arXiv 2403.17887",
    settings=Settings,
    decide=delete_scored_block,
    needs=lambda settings: frozenset({HIDDEN_STATES}),
    score=score,
)
