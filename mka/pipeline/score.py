"""The stage that scores layers."""

from mka.errors import PlanError
from mka.evidence.needs import Evidence
from mka.evidence.states import HiddenStates, LayerScores
from mka.methods import resolve_method
from mka.model.checkpoint import Checkpoint
from mka.recipe import MethodChoice
from mka.terminal import show_progress


def score_layers(choice: MethodChoice, checkpoint: Checkpoint, states: HiddenStates | None) -> LayerScores | None:
    """Score a checkpoint's layers; None for a method that does not look at them.

    Raises:
        NumericsError: if scores come out NaN, infinite or out of range.
        PlanError: if the hidden states are of another model.
    """
    method, settings = resolve_method(choice)
    if method.score is None:
        return None
    if states is None or states.layers != checkpoint.layers:
        given = "none" if states is None else f"{states.layers} layers"
        raise PlanError(f"method {choice.name!r} needs hidden states of {checkpoint.layers} layers, got {given}")
    pairs = checkpoint.layers * (checkpoint.layers + 1) // 2
    with show_progress("score layer pairs", pairs, "pair") as advance:
        evidence = Evidence(checkpoint.layers, checkpoint.kinds, states, on_progress=advance)
        return method.score(evidence, settings)
