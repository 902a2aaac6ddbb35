"""Configurations that climb a ladder of measurements under a budget, and the few that are compared at its end. Pure."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mka.errors import NumericsError
from mka.plan.budget import Budget
from mka.plan.configurations import Configuration


@dataclass(frozen=True)
class Rung:
    """One step: what is measured there, of how many configurations at most, and what it costs."""

    kind: str
    kept: int
    measure: Callable[[Configuration], float]
    cost: Callable[[Configuration], int]


@dataclass
class Search:
    """One search: its ladder, what is left of the budget, and what was found.

    Attributes:
        ladder: what every generation goes up.
        final: how the best of all generations are compared at last; None: they are not.
        budget: of all measurements.
        dearest: a configuration that costs no less than any other.
        seen: every configuration that was measured.
        top: those that are best at the top of the ladder with their divergences there, the best first; as many as are
            compared at last, or one.
        generations: how many were begun.
    """

    ladder: tuple[Rung, ...]
    final: Rung | None
    budget: Budget
    dearest: Configuration
    seen: set[Configuration] = field(default_factory=set)
    top: list[tuple[float, Configuration]] = field(default_factory=list)
    generations: int = 0

    def reserve(self, candidates: int, first: int = 1) -> int:
        """Return what so many candidates cost at most from a step of the ladder on, with the comparison at last."""
        final = self.final.kept * self.final.cost(self.dearest) if self.final else 0
        return final + sum(min(candidates, rung.kept) * rung.cost(self.dearest) for rung in self.ladder[first:])

    def climb(self, candidates: Iterable[Configuration]) -> bool:
        """Take candidates up the ladder, as many as the budget takes all the way; False if that is none."""
        found: list[tuple[float, Configuration]] = []
        first, *others = self.ladder
        for candidate in candidates:
            if candidate in self.seen:
                continue
            if not self.budget.affords(first.cost(candidate) + self.reserve(len(found) + 1)):
                break
            found.append((self._measure(first, candidate), candidate))
            self.seen.add(candidate)
        if not found:
            return False
        self.generations += 1
        for rung in others:
            # Sorted by the number alone, so that of equals the first one found goes on.
            found = sorted(found, key=lambda pair: pair[0])[: rung.kept]
            found = [(self._measure(rung, candidate), candidate) for _, candidate in found]
        self.top = sorted([*self.top, *found], key=lambda pair: pair[0])[: self.final.kept if self.final else 1]
        return True

    def compare(self) -> list[float]:
        """Return what the last measurement says of each at the top, in their order; nothing where one stands alone."""
        finalists = [candidate for value, candidate in self.top if math.isfinite(value)]
        if self.final is None or len(finalists) < 2:
            return []
        return [self._measure(self.final, candidate) for candidate in finalists]

    def _measure(self, rung: Rung, candidate: Configuration) -> float:
        self.budget.spend(rung.kind, rung.cost(candidate))
        try:
            return rung.measure(candidate)
        except NumericsError:  # it destroys the model: worse than any other
            return math.inf
