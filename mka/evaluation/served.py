"""What engines made of a candidate, as the gate reads it: whether they serve it, and how fast beside the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mka.errors import GuardError

if TYPE_CHECKING:
    from mka.recipe import GateRule

# Engine -> what `mka.pipeline.serve` keeps of it: "loads", "ratios" (figure -> number at once -> candidate / base), …
Served = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class EngineFact:
    """What a rule may ask of an engine.

    Attributes:
        figure: a figure of speed, as candidate / base; empty: whether the engine serves the candidate at all.
        bounds: how it may be bounded.
    """

    figure: str
    bounds: tuple[str, ...]


# By what a rule calls them.
ENGINE_FACTS: Mapping[str, EngineFact] = {
    "engine": EngineFact("", ("must",)),
    "prefill_speed": EngineFact("prefill_tokens_per_second", ("least",)),
    "decode_speed": EngineFact("decode_tokens_per_second", ("least",)),
}


def read_served(served: Served | None, rule: "GateRule") -> float:
    """Return what a rule asks of an engine: 1 if it serves the candidate and else 0, or how many times as fast.

    Of several numbers of prompts at once the least counts. What an engine does not serve is not fast.

    Raises:
        GuardError: if the engine was not asked.
    """
    found = (served or {}).get(str(rule.engine))
    if found is None:
        raise GuardError(f"the gate's rule on {rule.metric!r}: {rule.engine} was not asked; list it under `engines`")
    if not found["loads"]:
        return 0.0
    figure = ENGINE_FACTS[rule.metric].figure
    if not figure:
        return 1.0
    if not (ratios := found["ratios"].get(figure)):
        raise GuardError(f"the gate's rule on {rule.metric!r}: {rule.engine} was not timed long enough; ask for more")
    return min(map(float, ratios.values()))
