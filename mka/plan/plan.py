"""The merge plan: which source layers make each output layer, and how. A small JSON file a person can read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from mka.errors import PlanError
from mka.outside.reading import (
    LONGEST_JSON,
    STRICT,
    UnreadableError,
    build_from,
    give_reason,
    parse_json,
    quote,
    read_within,
)

FORMAT = "mka-plan/1"
# More than any model has; a plan is walked layer by layer.
MOST_LAYERS = 100_000


@dataclass(frozen=True)
class MergedLayer:
    """One output layer, made of a group of source layers by one of two verbs.

    ``combine``: ``sum_i weights[i] * source layer sources[i]``; weights apply to tensors whose norm gains were folded
    first (see `mka.transforms.merge`), and sum to 1. A single source with weight 1 is a plain copy.

    ``take``: the attention of the layers in ``attention`` and the MLP of those in ``mlp``. Of one layer the sublayer is
    taken whole; of several, the heads and neurons that matter most, as many as one layer has, chosen while aligning.
    """

    __pydantic_config__ = STRICT

    sources: tuple[int, ...]
    weights: tuple[float, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @property
    def verb(self) -> str:
        """``combine`` or ``take``."""
        return "take" if self.attention or self.mlp else "combine"

    @property
    def is_copy(self) -> bool:
        """Whether this output layer is one source layer, unchanged."""
        return len(self.sources) == 1 and self.weights == (1.0,)

    @property
    def used(self) -> tuple[int, ...]:
        """Source layers of which something is left."""
        if self.verb == "take":
            return tuple(sorted({*self.attention, *self.mlp}))
        return tuple(s for s, w in zip(self.sources, self.weights) if w != 0.0)

    @property
    def leader(self) -> int:
        """Source layer that decides the output layer's kind: the first its attention comes from."""
        return self.attention[0] if self.attention else self.sources[0]

    @property
    def selects(self) -> bool:
        """Whether heads or neurons of several layers compete, which only an alignment can decide."""
        return len(self.attention) > 1 or len(self.mlp) > 1

    def check(self, position: int) -> None:
        """Refuse a layer that is not well formed.

        Raises:
            PlanError: if weights do not sum to 1, or a sublayer comes from outside the group.
        """
        if self.verb == "take":
            if self.weights:
                raise PlanError(f"plan layer {position}: weights go with the verb combine, not with take")
            for name, chosen in (("attention", self.attention), ("mlp", self.mlp)):
                if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(self.sources):
                    raise PlanError(f"plan layer {position}: {name} of {list(chosen)}; allowed: {list(self.sources)}")
            return
        if not self.sources or len(self.sources) != len(self.weights):
            raise PlanError(f"plan layer {position}: {len(self.sources)} sources, {len(self.weights)} weights")
        if not abs(sum(self.weights) - 1.0) < 1e-6:
            raise PlanError(f"plan layer {position}: weights sum to {sum(self.weights):.6g}, must be 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of its verb."""
        body: dict[str, Any] = {"verb": self.verb, "sources": self.sources}
        if self.verb == "take":
            return body | {"attention": self.attention, "mlp": self.mlp}
        return body | {"weights": self.weights}


@dataclass(frozen=True)
class Step:
    """One decision on the way to the plan, kept so that a reader can follow it.

    ``left`` and ``right`` are the groups of source layers that became one (``right`` empty: the left was deleted),
    ``score`` what made it first choice, ``weight`` the share of the left group.
    """

    __pydantic_config__ = STRICT

    left: tuple[int, ...]
    right: tuple[int, ...]
    score: float
    weight: float


class Decision(NamedTuple):
    """What a method decides.

    Attributes:
        layers: one `MergedLayer` per output layer, in order.
        steps: the steps that led there, in order.
        facts: JSON-able, what a search spent and tried; empty where nothing was searched.
    """

    layers: tuple[MergedLayer, ...]
    steps: tuple[Step, ...] = ()
    facts: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class MergePlan:
    """How ``layers_in`` source layers become ``len(layers)`` output layers.

    Attributes:
        method: name of the compressor that made it.
        label: one line for people, e.g. what a baseline really is.
        layers_in: number of layers of the base model, L.
        layers: one `MergedLayer` per output layer, in order.
        steps: the decisions in the order they were taken.
        settings: the method's resolved settings.
        base: facts of the base checkpoint (model, digest).
        folds: SHA-256 of the folds it is written with (`mka.transforms.fold`); None if it needs none.
        search: what a search for it spent and tried; empty where nothing was searched.
    """

    __pydantic_config__ = STRICT

    method: str
    label: str
    layers_in: int
    layers: tuple[MergedLayer, ...]
    steps: tuple[Step, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    folds: str | None = None
    search: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a plan that is not well formed.

        Raises:
            PlanError: if an index is out of range, out of order or used twice, or weights do not sum to 1.
        """
        if not 1 <= len(self.layers) <= self.layers_in <= MOST_LAYERS:
            most = min(self.layers_in, MOST_LAYERS)
            raise PlanError(f"plan keeps {len(self.layers)} layers; allowed: 1 to {most}")
        last = -1
        for position, layer in enumerate(self.layers):
            layer.check(position)
            for source in layer.sources:
                if type(source) is not int:
                    raise PlanError(f"plan layer {position}: source {source!r}; sources are whole numbers")
                if not last < source < self.layers_in:
                    raise PlanError(
                        f"plan layer {position}: source {source} after {last}; sources must rise and stay below "
                        f"{self.layers_in}, each used once"
                    )
                last = source

    def check_steps(self, where: str) -> None:
        """Refuse steps about layers that there are not.

        Raises:
            PlanError: naming the step.
        """
        named = {source for layer in self.layers for source in layer.sources}
        for number, step in enumerate(self.steps):
            known = all(0 <= source < self.layers_in for source in step.left + step.right)
            if not step.left or not known or (step.right and step.left[0] not in named):
                raise PlanError(
                    f"{where}: step {number} is about layers {quote(step.left)} that the plan does not have"
                )

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
        kept = {s for layer in self.layers for s in layer.used}
        return tuple(i for i in range(self.layers_in) if i not in kept)

    @property
    def merged(self) -> tuple[MergedLayer, ...]:
        """Output layers made of more than one source layer."""
        return tuple(layer for layer in self.layers if len(layer.sources) > 1)

    @property
    def is_identity(self) -> bool:
        """Whether the plan changes nothing."""
        return self.layers_out == self.layers_in

    def to_json(self) -> str:
        """Serialise with every field named, in the documented format (docs/formats.md)."""
        body = {"format": FORMAT, **asdict(self), "layers_out": self.layers_out, "removed": list(self.removed)}
        body["layers"] = [layer.to_dict() for layer in self.layers]
        if not self.search:  # other plans are what they were before there was a search
            del body["search"]
        return json.dumps(body, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Self:
        """Read a plan back.

        Raises:
            PlanError: if the text is not a plan in this format.
        """
        try:
            body = parse_json(text)
            if not isinstance(body, dict):
                raise UnreadableError(f"expected an object, got {quote(body)}")
            if body.get("format") != FORMAT:
                raise PlanError(f"{where}: format {quote(body.get('format'))}, expected {FORMAT!r}")
            for layer in body.get("layers", ()):
                if (verb := layer.pop("verb")) not in ("combine", "take"):
                    raise PlanError(f"{where}: unknown verb {quote(verb)}; allowed: combine, take")
            # Of those with a default only these two may be left out; what follows from the others is not read.
            missing = sorted({f.name for f in fields(cls)} - {"folds", "search"} - body.keys())
            if missing:
                raise UnreadableError(f"{missing[0]} is missing")
            plan = build_from(cls, {f.name: body[f.name] for f in fields(cls) if f.name in body})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PlanError(f"{where}: not a plan ({give_reason(error)})") from None
        plan.check_steps(where)
        if strange := [key for key in ("model", "digest") if not isinstance(plan.base.get(key, ""), str | None)]:
            raise PlanError(f"{where}: base.{strange[0]} must be a text, got {quote(plan.base[strange[0]])}")
        return plan

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan file.

        Raises:
            PlanError: if it does not exist or is not a plan.
        """
        try:
            return cls.from_json(read_within(path, LONGEST_JSON).decode("utf-8"), str(path))
        except (OSError, ValueError) as error:
            raise PlanError(f"plan {path} cannot be read: {error}") from None


def identity_layers(count: int) -> tuple[MergedLayer, ...]:
    """Return ``count`` plain copies, the plan that changes nothing."""
    return tuple(MergedLayer((i,), (1.0,)) for i in range(count))


def keep_layers(kept: Sequence[int]) -> tuple[MergedLayer, ...]:
    """Return plain copies of the layers named, the plan of a deletion."""
    return tuple(MergedLayer((i,), (1.0,)) for i in sorted(kept))


def take_layers(sources: Sequence[int], attention: Sequence[int], mlp: Sequence[int]) -> MergedLayer:
    """Return the layer that takes these sublayers of a group; a group of one layer is a plain copy."""
    if len(sources) == 1:
        return MergedLayer((sources[0],), (1.0,))
    return MergedLayer(tuple(sources), attention=tuple(attention), mlp=tuple(mlp))
