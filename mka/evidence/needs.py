"""The kinds of evidence a method may ask for, and what it is then handed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mka.evidence.states import HiddenStates
from mka.plan.plan import MergedLayer

HIDDEN_STATES = "hidden_states"
REOBSERVE = "reobserve"
DIVERGENCE = "divergence"
LOSS = "loss"
OUTPUT_SIMILARITY = "output_similarity"
TRIALS = "trials"
REPAIRS = "repairs"
# What runs the model, or models planned of it, while a method plans.
RUNNING = frozenset({REOBSERVE, DIVERGENCE, LOSS, OUTPUT_SIMILARITY, TRIALS, REPAIRS})


class Measure(Protocol):
    """One number for the model that output layers make, on calibration tokens."""

    tokens: int  # that a model is measured on

    def __call__(self, layers: Sequence[MergedLayer]) -> float:
        """Run the model and measure it; one that was measured is remembered."""
        ...


class Trials(Protocol):
    """KL(base || changed base) on held-out calibration tokens, nats per token, for one change at a time."""

    def measure_attention(self, layer: int) -> float:
        """Without the attention of one layer."""
        ...

    def measure_mlp(self, layer: int) -> float:
        """Without the MLP of one layer."""
        ...

    def measure_group(self, layer: MergedLayer) -> float:
        """With one group of layers replaced by one aligned layer."""
        ...


class Repairs(Protocol):
    """KL(base || model made of these output layers) on calibration tokens, nats per token, before and after a repair.

    What each costs is what `mka.plan.budget` counts.
    """

    def observe(self) -> HiddenStates:
        """Hidden states of the base on the measured tokens; it is run once, for this and for all that follows."""
        ...

    def divergence(self, layers: Sequence[MergedLayer], tokens: int) -> float:
        """Without repair, on the first so many of the measured tokens."""
        ...

    def aligned(self, layers: Sequence[MergedLayer]) -> float:
        """Refitted on further tokens as an alignment does, on all measured tokens."""
        ...

    def healed(self, layers: Sequence[MergedLayer]) -> float:
        """Refitted, if anything is, and then healed for a moment on tokens that neither knows, on all measured ones."""
        ...


@dataclass(frozen=True)
class Evidence:
    """What a method may look at; only what its ``needs`` asked for is there.

    Attributes:
        layers: L of the base model.
        kinds: one value per layer; layers of different kinds are never merged.
        states: hidden states of the base.
        reobserve: hidden states of a partly merged model, given its output layers.
        divergence: KL(base || model made of these output layers) on calibration tokens, nats per token.
        loss: mean negative log-likelihood of the model made of these output layers, nats per predicted token.
        output_similarity: mean cosine, over calibration texts, of the final hidden states of the base and of the model
            made of these output layers.
        trials: what single changes of the base cost; see `Trials`.
        repairs: what whole configurations cost before and after a repair; see `Repairs`.
        on_progress: called with the number of units done, for a progress bar.
    """

    layers: int
    kinds: Sequence[Any]
    states: HiddenStates | None = None
    reobserve: Callable[[Sequence[MergedLayer]], HiddenStates] | None = None
    divergence: Measure | None = None
    loss: Measure | None = None
    output_similarity: Measure | None = None
    trials: Trials | None = None
    repairs: Repairs | None = None
    on_progress: Callable[[int], Any] | None = None
