"""SLEB: delete, one at a time, the layer whose absence costs least on calibration text.

Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
arXiv 2402.09025. Each step measures every remaining layer's deletion from the model as it then is, by the mean negative
log-likelihood of calibration tokens (the logarithm of their perplexity), and makes the best one. Deletions for two
targets are nested. Calibration is the first ``search_tokens`` tokens of the calibration set; the source took 128
samples of WikiText-2.
"""

from mka.evidence.needs import LOSS, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.plan.deleting import deletable_layers
from mka.plan.plan import Decision, Step, identity_layers
from mka.plan.target import Aim
from mka.sections import Section


class Settings(Section):
    """SLEB has no settings."""


def decide(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> Decision:
    """Delete greedily by calibration loss; ties go to the deeper layer. A step's score is the loss after it."""
    assert evidence.loss is not None
    layers = list(identity_layers(evidence.layers))
    free = deletable_layers(evidence.layers, aim)
    steps: list[Step] = []
    while len(layers) > aim.layers_out:
        # Deepest first: each trial then begins like the one before, which `loss` makes use of; and ties go deeper.
        trials = free[: len(free) - len(steps)][::-1]
        losses = {i: evidence.loss([*layers[:i], *layers[i + 1 :]]) for i in trials}
        best = min(trials, key=losses.__getitem__)
        steps.append(Step(layers.pop(best).sources, (), losses[best], 0.0))
        if evidence.on_progress:
            evidence.on_progress(1)
    return Decision(tuple(layers), tuple(steps))


METHOD = Method(
    name="sleb",
    summary="Delete, one at a time, the layer whose absence costs least calibration loss",
    label="SLEB, layers deleted greedily by calibration loss",
    source="arXiv 2402.09025",
    settings=Settings,
    decide=decide,
    needs=lambda settings: frozenset({LOSS}),
)
