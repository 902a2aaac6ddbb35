"""What measuring a configuration costs, in forward tokens, and a budget that is never exceeded. Pure.

A forward token is one token through all layers of the base. Costs are whole numbers of tokens through one layer, so
that no rounding adds up; the head is not counted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mka.plan.plan import MergedLayer

# Layers at the end that a healing trains in any case.
LAST_TRAINED = 3


def count_front(layers: Sequence[MergedLayer]) -> int:
    """Return how many output layers, from the first on, are the base's own in their places."""
    return next((place for place, layer in enumerate(layers) if not _stands(layer, place)), len(layers))


def count_untouched(layers: Sequence[MergedLayer]) -> int:
    """Return how many output layers, from the first on, an alignment leaves as the base has them.

    One fewer than `count_front` where layers behind the last of those are deleted: it makes up for them.
    """
    front = count_front(layers)
    answers_for_more = 0 < front < len(layers) and layers[front].sources[0] > front
    return front - 1 if answers_for_more else front


def count_run(layers: Sequence[MergedLayer], tokens: int) -> int:
    """Return the cost of running the model these output layers make, where the base has been run already."""
    return tokens * (len(layers) - count_front(layers))


def count_walk(layers: Sequence[MergedLayer], count: int, tokens: int) -> int:
    """Return the cost of an aligned walk of teacher and student, from the first layer of ``count`` on."""
    return tokens * (count + len(layers) - count_untouched(layers))


def count_healing(layers: Sequence[MergedLayer], count: int, tokens: int, measured: int, refitted: int = 0) -> int:
    """Return the cost of a short healing: of the refit before it, the training, and a measurement before and after.

    A token backwards counts as two forwards. In front of the first layer that is trained teacher and student are one,
    and run once; behind it the teacher's layers count once, and in training the student's thrice.

    Args:
        layers: output layers.
        count: layers of the base.
        tokens: trained on.
        measured: measured on.
        refitted: fitted on before; 0: the layers are healed as they are.
    """
    shared = count_untouched(layers) if refitted else count_front(layers)
    trained = len(layers) - min(shared, max(0, len(layers) - LAST_TRAINED))
    return count_walk(layers, count, refitted) + tokens * (count + 3 * trained) + 2 * measured * (count + trained)


def _stands(layer: MergedLayer, place: int) -> bool:
    return layer.is_copy and layer.leader == place


@dataclass
class Budget:
    """Forward tokens that may be spent, and what was spent.

    Attributes:
        tokens: forward tokens in all.
        layers: L of the base.
        on_spent: called with forward tokens spent, whole ones.
        used: tokens through one layer that were spent.
        counts: measurements, by kind.
    """

    tokens: int
    layers: int
    on_spent: Callable[[int], Any] | None = None
    used: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def spent(self) -> float:
        """Forward tokens that were spent."""
        return self.used / self.layers

    def affords(self, cost: int) -> bool:
        """Whether so many tokens through one layer are left."""
        return self.used + cost <= self.tokens * self.layers

    def spend(self, kind: str, cost: int) -> None:
        """Take tokens through one layer for a measurement; they must be there."""
        assert self.affords(cost)
        before, self.used = self.used // self.layers, self.used + cost
        self.counts[kind] += 1
        if self.on_spent:
            self.on_spent(self.used // self.layers - before)
