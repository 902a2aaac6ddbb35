"""What the MKA authors' released code really does: it deletes the last N layers.

The released program assigns merged weights into the dictionary that ``state_dict()`` returns, which changes no
parameter, and then deletes the second layer of the pair; the pair is always the last two. Its result is the base model
without its last N layers, whatever the similarities were. It is kept as a baseline, under that name.
"""

from mka.evidence.needs import Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.plan.plan import Decision, Step, keep_layers
from mka.plan.target import Aim
from mka.sections import Section


class Settings(Section):
    """Tail deletion has no settings."""


def decide(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> Decision:
    """Keep the first ``aim.layers_out`` layers; protection does not apply, as it does not in that code."""
    deleted = range(evidence.layers - 1, aim.layers_out - 1, -1)
    steps = tuple(Step((i,), (), 0.0, 0.0) for i in deleted)
    return Decision(keep_layers(range(aim.layers_out)), steps)


METHOD = Method(
    name="reference_code",
    summary="Delete the last N layers: what the MKA authors' released code does (it merges nothing)",
    label="Baseline: tail deletion, what the MKA authors' released code does (it merges nothing)",
    source="behaviour of the released pipeline.py",
    settings=Settings,
    decide=decide,
    fewest=lambda kinds, aim, settings: 1,
)
