"""ShortGPT: delete the layers with the least Block Influence (arXiv 2403.03853, eq. 1)."""

from mka.evidence.needs import HIDDEN_STATES, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.plan.deleting import delete_least_important
from mka.plan.plan import MergePlan
from mka.plan.target import Aim
from mka.sections import Section


class Settings(Section):
    """ShortGPT has no settings."""


def score(evidence: Evidence, settings: Settings) -> LayerScores:
    """Block Influence of every layer, (L,): 1 - mean cosine between a layer's input and its output."""
    assert evidence.states is not None
    meaning = "Block Influence, 1 - mean cosine of a layer's input and output (0: changes nothing, 2: reverses)"
    return LayerScores("layer-importance", evidence.states.block_influence, meaning, "shortgpt", {})


def plan(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> MergePlan:
    """Delete the layers of least Block Influence."""
    assert scores is not None
    layers, steps = delete_least_important(
        scores.values, aim.layers_out, protect_first=aim.protect_first, protect_last=aim.protect_last
    )
    return MergePlan("shortgpt", METHOD.label, evidence.layers, layers, steps)


METHOD = Method(
    name="shortgpt",
    summary="Delete the layers with the least Block Influence",
    label="ShortGPT, layers deleted by Block Influence",
    source="arXiv 2403.03853",
    settings=Settings,
    plan=plan,
    needs=lambda settings: frozenset({HIDDEN_STATES}),
    score=score,
)
