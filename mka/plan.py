"""The merge plan: which source layers make each output layer, and how. A small JSON file a person can read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from mka.errors import PlanError

FORMAT = "mka-plan/1"


@dataclass(frozen=True)
class LayerRecipe:
    """One output layer: ``sum_i weights[i] * source layer sources[i]``, the verb ``combine``.

    A single source with weight 1 is a plain copy. Weights apply to tensors whose norm gains were folded first
    (see `mka.merging`), and sum to 1.
    """

    sources: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def is_copy(self) -> bool:
        """Whether this output layer is one source layer, unchanged."""
        return len(self.sources) == 1 and self.weights[0] == 1.0


@dataclass(frozen=True)
class Step:
    """One decision on the way to the plan, kept so that a reader can follow it.

    ``left`` and ``right`` are the groups of source layers that became one (``right`` empty: the left was deleted),
    ``score`` what made it first choice, ``weight`` the share of the left group.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    score: float
    weight: float


@dataclass(frozen=True)
class MergePlan:
    """How ``layers_in`` source layers become ``len(layers)`` output layers.

    Attributes:
        method: name of the compressor that made it.
        label: one line for people, e.g. what a baseline really is.
        layers_in: number of layers of the base model, L.
        layers: one `LayerRecipe` per output layer, in order.
        steps: the decisions in the order they were taken.
        settings: the method's resolved settings.
        base: facts of the base checkpoint (model, digest).
    """

    method: str
    label: str
    layers_in: int
    layers: tuple[LayerRecipe, ...]
    steps: tuple[Step, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a plan that is not well formed.

        Raises:
            PlanError: if an index is out of range, out of order or used twice, or weights do not sum to 1.
        """
        if not 1 <= len(self.layers) <= self.layers_in:
            raise PlanError(f"plan keeps {len(self.layers)} layers; allowed: 1 to {self.layers_in}")
        last = -1
        for position, layer in enumerate(self.layers):
            if not layer.sources or len(layer.sources) != len(layer.weights):
                raise PlanError(f"plan layer {position}: {len(layer.sources)} sources, {len(layer.weights)} weights")
            for source in layer.sources:
                if type(source) is not int:
                    raise PlanError(f"plan layer {position}: source {source!r}; sources are whole numbers")
                if not last < source < self.layers_in:
                    raise PlanError(
                        f"plan layer {position}: source {source} after {last}; sources must rise and stay below "
                        f"{self.layers_in}, each used once"
                    )
                last = source
            if not abs(sum(layer.weights) - 1.0) < 1e-6:
                raise PlanError(f"plan layer {position}: weights sum to {sum(layer.weights):.6g}, must be 1")

    @property
    def layers_out(self) -> int:
        """Number of output layers."""
        return len(self.layers)

    @property
    def layer_ratio(self) -> float:
        """``1 - layers out / layers in``, the ratio that papers print."""
        return 1.0 - self.layers_out / self.layers_in

    @property
    def removed(self) -> tuple[int, ...]:
        """Source layers of which nothing is left in the output."""
        kept = {s for layer in self.layers for s, w in zip(layer.sources, layer.weights) if w != 0.0}
        return tuple(i for i in range(self.layers_in) if i not in kept)

    @property
    def merged(self) -> tuple[LayerRecipe, ...]:
        """Output layers made of more than one source layer."""
        return tuple(layer for layer in self.layers if len(layer.sources) > 1)

    @property
    def is_identity(self) -> bool:
        """Whether the plan changes nothing."""
        return self.layers_out == self.layers_in

    def to_json(self) -> str:
        """Serialise with every field named, in the documented format (docs/formats.md)."""
        body = {"format": FORMAT, **asdict(self), "layers_out": self.layers_out, "removed": list(self.removed)}
        body["layers"] = [{"verb": "combine", **asdict(layer)} for layer in self.layers]
        return json.dumps(body, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Self:
        """Read a plan back.

        Raises:
            PlanError: if the text is not a plan in this format.
        """
        try:
            body = json.loads(text)
            if body.get("format") != FORMAT:
                raise PlanError(f"{where}: format {body.get('format')!r}, expected {FORMAT!r}")
            verbs = {layer["verb"] for layer in body["layers"]} - {"combine"}
            if verbs:
                raise PlanError(f"{where}: unknown verb {sorted(verbs)}; allowed: combine")
            return cls(
                method=body["method"],
                label=body["label"],
                layers_in=body["layers_in"],
                layers=tuple(LayerRecipe(tuple(x["sources"]), tuple(x["weights"])) for x in body["layers"]),
                steps=tuple(Step(tuple(s["left"]), tuple(s["right"]), s["score"], s["weight"]) for s in body["steps"]),
                settings=body["settings"],
                base=body["base"],
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{where}: not a plan ({type(error).__name__}: {error})") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan file.

        Raises:
            PlanError: if it does not exist or is not a plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan {path} cannot be read: {error}") from None


def identity_layers(count: int) -> tuple[LayerRecipe, ...]:
    """Return ``count`` plain copies, the plan that changes nothing."""
    return tuple(LayerRecipe((i,), (1.0,)) for i in range(count))


def keep_layers(kept: Sequence[int]) -> tuple[LayerRecipe, ...]:
    """Return plain copies of the layers named, the plan of a deletion."""
    return tuple(LayerRecipe((i,), (1.0,)) for i in sorted(kept))
