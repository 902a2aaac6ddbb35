"""ShortGPT: delete the layers with the least Block Influence (arXiv 2403.03853, eq. 1)."""

from functools import partial

from mka.evidence.needs import HIDDEN_STATES
from mka.methods import Method
from mka.sections import Section
from mka.similarity.blocks import delete_scored_layers, score_influence


class Settings(Section):
    """ShortGPT has no settings."""


METHOD = Method(
    name="shortgpt",
    summary="Delete the layers with the least Block Influence",
    label="ShortGPT, layers deleted by Block Influence",
    source="arXiv 2403.03853",
    settings=Settings,
    decide=delete_scored_layers,
    needs=lambda settings: frozenset({HIDDEN_STATES}),
    score=partial(score_influence, method="shortgpt"),
)
