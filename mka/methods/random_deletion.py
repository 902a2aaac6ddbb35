"""Random deletion: what any choice of layers has to beat."""

import numpy as np
from pydantic import Field

from mka.evidence.needs import Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.plan.deleting import delete_least_important
from mka.plan.plan import Decision
from mka.plan.target import Aim
from mka.sections import Section


class Settings(Section):
    """Settings of random deletion."""

    seed: int = Field(0, ge=0, description="Draws the order in which layers are deleted")


def decide(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> Decision:
    """Delete the first unprotected layers of one random order; under one seed, deletions are nested.

    Every set of unprotected layers is equally likely. A step's score is the layer's place in the order of all layers.
    """
    place = np.random.default_rng(settings.seed).permutation(evidence.layers).astype(np.float64)
    return delete_least_important(place, aim)


METHOD = Method(
    name="random_deletion",
    summary="Delete layers drawn at random: the baseline of any choice",
    label="Baseline: layers deleted at random",
    source="uniform draw without replacement",
    settings=Settings,
    decide=decide,
)
