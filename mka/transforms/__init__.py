"""What is done to weights: one file each, checkpoint in, stock folder out, streamed; a table imports it when asked for.

A fold (`mka.transforms.fold`) has no row: it makes no folder of its own, a merge multiplies it in on the way.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mka.errors import RecipeError, nearest
from mka.kernels import MIXED, list_mixed
from mka.recipe import QuantizeSettings, Recipe, TransformChoice
from mka.sections import Section, explain_validation

if TYPE_CHECKING:
    from mka.model.checkpoint import Checkpoint

# A row per transform: its name, and the module that holds its TRANSFORM; one that walks texts lives beside the walk.
_TRANSFORMS = {
    "cast": "mka.transforms.cast",
    "gptq": "mka.alignment.gptq",
    "higgs": "mka.transforms.higgs",
    "merge": "mka.transforms.merge",
    "rtn": "mka.transforms.rtn",
}


@dataclass(frozen=True)
class Scheme:
    """What a scheme of a recipe's `quantize` leaves of a linear layer; where it runs, `mka.kernels` knows.

    Attributes:
        bits: of a weight.
        grouped: one scale per group of `group_size` weights; else one per row.
        activations: bits that inputs are rounded to while the model runs, with one scale per token; None: they are not.
    """

    bits: int
    grouped: bool = True
    activations: int | None = None


# A row per scheme, as a recipe spells it.
SCHEMES = {
    **{f"int{bits}": Scheme(bits) for bits in range(8, 1, -1)},
    "w8a8": Scheme(8, grouped=False, activations=8),
}

# A row per rounding, as a recipe spells it: the transform that does it.
_ROUNDINGS = {"nearest": "rtn", "gptq": "gptq", "gptaq": "gptq"}

# Kinds of evidence a transform may ask for: the base as (checkpoint, how to load it), and the calibration texts as
# (set, how to read it).
BASE, CALIBRATION = "base", "calibration"


@dataclass(frozen=True)
class Transform:
    """One thing that is done to the weights of a checkpoint.

    Attributes:
        name: as the table spells it.
        summary: what a progress bar says meanwhile.
        check: ``check(checkpoint, settings)`` refuses, before work begins, what cannot be done to this checkpoint.
        foresee: ``foresee(checkpoint, settings)`` returns the bytes of the tensors that will be written.
        apply: ``apply(checkpoint, settings, evidence, output, verify=, on_tensor=)`` writes a stock folder, publishes
            it once ``verify(folder)`` has looked at it, and returns what that found; ``on_tensor`` is told the bytes
            of each tensor written, in sum what ``foresee`` says.
        needs: which kinds of ``evidence`` it cannot do without.
        settings: its settings, a closed pydantic section, if a recipe's `transforms` may name it; None if some stage
            of its own knows what to hand it.
        version: raised by hand when it makes something else of the same settings; of those with ``settings``.
        outline: ``outline(checkpoint, settings)`` returns the checkpoint as it will be, config and headers alone, for
            what is checked and reckoned of the next one; without it, these stay as they are.
        describe: ``describe(settings)`` says in a few words what was done; its name and settings, if None.
    """

    name: str
    summary: str
    check: Callable[["Checkpoint", Any], None]
    foresee: Callable[["Checkpoint", Any], int]
    apply: Callable[..., Any]
    needs: frozenset[str] = frozenset()
    settings: type[Section] | None = None
    version: int = 1
    outline: Callable[["Checkpoint", Any], "Checkpoint"] = field(default=lambda checkpoint, settings: checkpoint)
    describe: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Treatment:
    """A transform with its settings, resolved once for everything that is done with it.

    Attributes:
        transform: what is done.
        settings: validated, of the transform's own kind.
    """

    transform: Transform
    settings: Any

    @property
    def key(self) -> dict[str, Any]:
        """What decides its result, beside the model it reads, as JSON types."""
        settings = self.settings.model_dump(mode="json")
        return {"name": self.transform.name, "version": self.transform.version, "settings": settings}

    def describe(self) -> str:
        """Say in a few words what is done."""
        if self.transform.describe is not None:
            return self.transform.describe(self.settings)
        return " ".join([self.transform.name, *(f"{key}={value}" for key, value in self.key["settings"].items())])


def outline_treated(checkpoint: "Checkpoint", treatments: Iterable[Treatment]) -> list["Checkpoint"]:
    """Return a checkpoint and, after each treatment, what it will be then, config and headers alone."""
    outlines = [checkpoint]
    for treatment in treatments:
        outlines.append(treatment.transform.outline(outlines[-1], treatment.settings))
    return outlines


def resolve_transforms(choices: Iterable[TransformChoice], where: str = "recipe") -> tuple[Treatment, ...]:
    """Return what a recipe's `transforms` name, with validated settings.

    Raises:
        RecipeError: on an unknown transform, key or value; the nearest valid one is suggested.
    """
    return tuple(_resolve(choice, f"{where}: transforms.{place}") for place, choice in enumerate(choices))


def _resolve(choice: TransformChoice, where: str) -> Treatment:
    transform = get_transform(choice.name) if choice.name in _TRANSFORMS else None
    if transform is None or transform.settings is None:
        names = transform_names()
        hint = nearest(choice.name, names)
        raise RecipeError(f"{where}: unknown transform {choice.name!r}{hint}; transforms: {', '.join(names)}")
    try:
        return Treatment(transform, transform.settings.model_validate(choice.settings))
    except ValidationError as error:
        about = f"{where}: settings of transform {choice.name!r}"
        raise RecipeError(explain_validation(error, transform.settings, about)) from None


def transform_names() -> list[str]:
    """Names of the transforms that a recipe may list."""
    return [name for name in _TRANSFORMS if get_transform(name).settings is not None]


def get_transform(name: str) -> Transform:
    """Return a transform by its name in the table."""
    return importlib.import_module(_TRANSFORMS[name]).TRANSFORM


def list_options(settings: QuantizeSettings) -> list[str]:
    """Return the schemes that linear layers may have, the most bits first; where they are mixed, those that run."""
    return list_mixed(settings.serve_on) if settings.scheme == MIXED else [settings.scheme]


def get_quantizer(settings: QuantizeSettings) -> Transform:
    """Return the transform that does what a recipe's ``quantize`` asks for, with a scheme other than "off"."""
    return get_transform(_ROUNDINGS[settings.rounding])


def looks_at_texts(settings: QuantizeSettings) -> bool:
    """Whether a recipe's ``quantize`` rounds, and looks at calibration texts for it."""
    return settings.scheme != "off" and CALIBRATION in get_quantizer(settings).needs


def list_needs(recipe: Recipe) -> frozenset[str]:
    """Return which kinds of evidence a recipe's ``transforms`` and ``quantize`` ask for."""
    asked = [treatment.transform for treatment in resolve_transforms(recipe.transforms)]
    if recipe.quantize.scheme != "off":
        asked.append(get_quantizer(recipe.quantize))
    return frozenset(kind for transform in asked for kind in transform.needs)
