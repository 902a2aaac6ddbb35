"""Compressors: one file each, behind one seam. `get_method` imports the file when it is asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError

from mka.cuts import CutEvidence
from mka.errors import RecipeError, nearest
from mka.folds import Folds
from mka.plan import LayerRecipe, MergePlan
from mka.recipe import MethodChoice
from mka.sections import Section, explain_validation
from mka.states import HiddenStates, LayerScores

# A row per method: the name in recipes, and the module that holds its METHOD.
_METHODS = {
    "aligned": "mka.methods.aligned",
    "laco": "mka.methods.laco",
    "linearpatch": "mka.methods.linearpatch",
    "mka": "mka.methods.mka",
    "prune_and_comp": "mka.methods.prune_and_comp",
    "random_deletion": "mka.methods.random_deletion",
    "reference_code": "mka.methods.reference_code",
    "replaceme": "mka.methods.replaceme",
    "shortgpt": "mka.methods.shortgpt",
    "sleb": "mka.methods.sleb",
    "uidl": "mka.methods.uidl",
}

HIDDEN_STATES = "hidden_states"
REOBSERVE = "reobserve"
DIVERGENCE = "divergence"
LOSS = "loss"
OUTPUT_SIMILARITY = "output_similarity"
TRIALS = "trials"


@dataclass(frozen=True)
class Aim:
    """What a plan has to reach: remaining layers, and how many stay untouched at either end."""

    layers_out: int
    protect_first: int = 0
    protect_last: int = 0


class Trials(Protocol):
    """KL(base || changed base) on held-out calibration tokens, nats per token, for one change at a time."""

    def measure_attention(self, layer: int) -> float:
        """Without the attention of one layer."""
        ...

    def measure_mlp(self, layer: int) -> float:
        """Without the MLP of one layer."""
        ...

    def measure_group(self, layer: LayerRecipe) -> float:
        """With one group of layers replaced by one aligned layer."""
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
        on_progress: called with the number of units done, for a progress bar.
    """

    layers: int
    kinds: Sequence[Any]
    states: HiddenStates | None = None
    reobserve: Callable[[Sequence[LayerRecipe]], HiddenStates] | None = None
    divergence: Callable[[Sequence[LayerRecipe]], float] | None = None
    loss: Callable[[Sequence[LayerRecipe]], float] | None = None
    output_similarity: Callable[[Sequence[LayerRecipe]], float] | None = None
    trials: Trials | None = None
    on_progress: Callable[[int], Any] | None = None


@dataclass(frozen=True)
class Method:
    """One compressor.

    Attributes:
        name: as recipes spell it.
        summary: one line for `mka methods`.
        label: one line that goes into plan, report and card.
        source: where the formula comes from.
        settings: its settings, a closed pydantic section.
        needs: which parts of `Evidence` it wants under given settings.
        score: what it thinks of the layers; None if it does not look.
        plan_settings: settings that scores do not depend on.
        plan: evidence, scores, aim and settings to a plan.
        fit: residual streams at the plan's cuts, the plan and settings to folds; None if it fits nothing.
        competing: most layers whose heads or neurons compete for one output layer under given settings; above 1, only
            an alignment can write its plans.
        units: how many units at most, and of what, ``plan`` reports for L layers, an aim and settings.
    """

    name: str
    summary: str
    label: str
    source: str
    settings: type[Section]
    plan: Callable[[Evidence, LayerScores | None, Aim, Any], MergePlan]
    needs: Callable[[Any], frozenset[str]] = field(default=lambda settings: frozenset())
    score: Callable[[Evidence, Any], LayerScores] | None = None
    plan_settings: frozenset[str] = frozenset()
    fit: Callable[[CutEvidence, MergePlan, Any], Folds] | None = None
    competing: Callable[[Any], int] = field(default=lambda settings: 1)
    units: Callable[[int, Aim, Any], tuple[int, str]] = field(
        default=lambda layers, aim, settings: (layers - aim.layers_out, "merge")
    )


def method_names() -> list[str]:
    """Names of all methods."""
    return list(_METHODS)


def get_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        RecipeError: if there is no such method; the nearest name is suggested.
    """
    if name not in _METHODS:
        raise RecipeError(f"unknown method {name!r}{nearest(name, _METHODS)}; methods: {', '.join(_METHODS)}")
    return importlib.import_module(_METHODS[name]).METHOD


def method_settings(name: str, given: Mapping[str, Any], where: str = "method") -> Any:
    """Validate a method's settings.

    Raises:
        RecipeError: on an unknown method, key or value.
    """
    model = get_method(name).settings
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise RecipeError(explain_validation(error, model, f"{where}: settings of method {name!r}")) from None


def resolve_method(choice: MethodChoice, where: str = "method") -> tuple[Method, Any]:
    """Return the method a recipe names and its validated settings; refusals are those of `method_settings`."""
    return get_method(choice.name), method_settings(choice.name, choice.settings, where)


def find_needs(choice: MethodChoice) -> frozenset[str]:
    """Return which parts of `Evidence` a recipe's method wants; refusals are those of `method_settings`."""
    method, settings = resolve_method(choice)
    return method.needs(settings)


def check_alignment(choice: MethodChoice, enabled: bool, where: str = "method") -> None:
    """Refuse a method that cannot do with, or without, an alignment.

    Raises:
        RecipeError: if it fits its own correction and alignment is on, or leaves a choice to it and alignment is off.
    """
    method, settings = resolve_method(choice, where)
    if enabled and method.fit:
        raise RecipeError(
            f"{where}: method {method.name!r} fits its own correction; alignment is for methods that do not"
        )
    if not enabled and method.competing(settings) > 1:
        operator = f" with operator {settings.operator}" if hasattr(settings, "operator") else ""
        raise RecipeError(f"{where}: method {method.name!r}{operator} needs alignment: {{enabled: true}}")
