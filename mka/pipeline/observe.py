"""The stage that observes hidden states."""

from mka.evidence.gather import observe_texts
from mka.evidence.needs import HIDDEN_STATES
from mka.evidence.states import HiddenStates
from mka.methods import find_needs
from mka.model.checkpoint import Checkpoint
from mka.recipe import CalibrationSettings, MethodChoice, ModelSource
from mka.texts.calibration import CalibrationSet


def observe_checkpoint(
    checkpoint: Checkpoint, calibration: CalibrationSet, settings: CalibrationSettings, source: ModelSource
) -> HiddenStates:
    """Observe a checkpoint's layers on its calibration set.

    Raises:
        CheckpointError: if the model does not load whole.
        NumericsError: if hidden states are not finite.
    """
    from mka.model.loading import open_decoder

    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        return observe_texts(decoder, tokenizer, calibration.texts, settings, "observe layers")


def needs_hidden_states(choice: MethodChoice) -> bool:
    """Whether a method looks at hidden states at all."""
    return HIDDEN_STATES in find_needs(choice)
