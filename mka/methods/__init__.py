"""Compressors: one file each, behind one seam. `get_method` imports the file when it is asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from mka.errors import RecipeError, nearest
from mka.evidence.cuts import CutEvidence
from mka.evidence.needs import HIDDEN_STATES, Evidence
from mka.evidence.states import LayerScores
from mka.plan.deleting import count_protected
from mka.plan.plan import Decision, MergePlan
from mka.plan.target import Aim, refuse_unreachable
from mka.recipe import MethodChoice
from mka.sections import Section, explain_validation
from mka.transforms.fold import Folds

# A row per method: the name in recipes, and the module that holds its METHOD.
_METHODS = {
    "aligned": "mka.methods.aligned",
    "evolution": "mka.methods.evolution",
    "laco": "mka.methods.laco",
    "linearpatch": "mka.methods.linearpatch",
    "mka": "mka.methods.mka",
    "policy_gradient": "mka.methods.policy_gradient",
    "prune_and_comp": "mka.methods.prune_and_comp",
    "random_deletion": "mka.methods.random_deletion",
    "reference_code": "mka.methods.reference_code",
    "replaceme": "mka.methods.replaceme",
    "shortgpt": "mka.methods.shortgpt",
    "sleb": "mka.methods.sleb",
    "uidl": "mka.methods.uidl",
}


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
        decide: evidence, scores, aim and settings to output layers and the steps that led there.
        fit: residual streams at the plan's cuts, the plan and settings to folds; None if it fits nothing.
        competing: most layers whose heads or neurons compete for one output layer under given settings; above 1, only
            an alignment can write its plans.
        units: how many units at most, and of what, ``decide`` reports for L layers, an aim and settings.
        fewest: how many layers at least it leaves of layers of these kinds, given an aim's protection and settings;
            what the model makes of them may leave more.
        check_search: refuses settings that buy nothing where every model is measured on so many tokens; None if it
            takes what there is.
    """

    name: str
    summary: str
    label: str
    source: str
    settings: type[Section]
    decide: Callable[[Evidence, LayerScores | None, Aim, Any], Decision]
    needs: Callable[[Any], frozenset[str]] = field(default=lambda settings: frozenset())
    score: Callable[[Evidence, Any], LayerScores] | None = None
    plan_settings: frozenset[str] = frozenset()
    fit: Callable[[CutEvidence, MergePlan, Any], Folds] | None = None
    competing: Callable[[Any], int] = field(default=lambda settings: 1)
    units: Callable[[int, Aim, Any], tuple[int, str]] = field(
        default=lambda layers, aim, settings: (layers - aim.layers_out, "merge")
    )
    fewest: Callable[[Sequence[Any], Aim, Any], int] = field(
        default=lambda kinds, aim, settings: max(1, count_protected(len(kinds), aim))
    )
    check_search: Callable[[int, Any], Any] | None = None


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


@dataclass(frozen=True)
class Planner:
    """A method with its settings, resolved once for everything that is done with it.

    Attributes:
        method: who decides.
        settings: validated, of the method's own kind.
    """

    method: Method
    settings: Any

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def needs(self) -> frozenset[str]:
        """Which kinds of evidence it wants."""
        return self.method.needs(self.settings)

    @property
    def reads_texts(self) -> bool:
        """Whether it runs the model on calibration texts while it plans or fits, beyond hidden states."""
        return bool(self.method.fit or self.needs - {HIDDEN_STATES})

    @property
    def competing(self) -> int:
        """Most layers whose heads or neurons compete for one output layer."""
        return self.method.competing(self.settings)

    def dump_settings(self, *, scoring: bool = False) -> dict[str, Any]:
        """Return the settings as JSON types; with ``scoring`` those only that scores depend on."""
        idle = self.method.plan_settings if scoring else frozenset()
        return {key: value for key, value in self.settings.model_dump(mode="json").items() if key not in idle}

    def check_aim(self, kinds: Sequence[Any], aim: Aim) -> None:
        """Refuse, before anything is computed, an aim that the method cannot reach.

        Args:
            kinds: one value per layer of the base.
            aim: the target in layers.

        Raises:
            PlanError: if protection or kinds leave more than the target, or a budget of the method buys nothing.
        """
        if aim.layers_out < len(kinds):
            fewest = self.method.fewest(kinds, aim, self.settings)
            refuse_unreachable(aim.layers_out, fewest, aim.protect_first, aim.protect_last)
            self.method.units(len(kinds), aim, self.settings)

    def plan(
        self, evidence: Evidence, scores: LayerScores | None, aim: Aim, base: Mapping[str, Any] | None = None
    ) -> MergePlan:
        """Let the method decide, and put down what was decided, by whom, with which settings and of which base.

        Args:
            evidence: what the method asked for.
            scores: what it thought of the layers.
            aim: the target in layers.
            base: facts of the base checkpoint.

        Raises:
            PlanError: if protection, layer kinds or scores do not let it reach the aim.
        """
        made = self.method.decide(evidence, scores, aim, self.settings)
        label, settings = self.method.label, self.dump_settings()
        return MergePlan(
            self.name, label, evidence.layers, made.layers, made.steps, settings, base or {}, search=dict(made.facts)
        )


def resolve_method(choice: MethodChoice, where: str = "method") -> Planner:
    """Return the method a recipe names with its validated settings; refusals are those of `method_settings`."""
    return Planner(get_method(choice.name), method_settings(choice.name, choice.settings, where))


def check_alignment(planner: Planner, enabled: bool, where: str = "method") -> None:
    """Refuse a method that cannot do with, or without, an alignment.

    Raises:
        RecipeError: if it fits its own correction and alignment is on, or leaves a choice to it and alignment is off.
    """
    if enabled and planner.method.fit:
        raise RecipeError(
            f"{where}: method {planner.name!r} fits its own correction; alignment is for methods that do not"
        )
    if not enabled and planner.competing > 1:
        operator = f" with operator {planner.settings.operator}" if hasattr(planner.settings, "operator") else ""
        raise RecipeError(f"{where}: method {planner.name!r}{operator} needs alignment: {{enabled: true}}")
