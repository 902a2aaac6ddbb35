"""Whole configurations, everything a plan can say at a number of layers: listed, drawn and changed. Pure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from mka.plan.deleting import deletable_layers
from mka.plan.plan import MergedLayer, Step, keep_layers
from mka.plan.target import Aim

Configuration = tuple[MergedLayer, ...]

# Share of the layer that leads in a sum that is no mean.
LEADING = 0.75


@dataclass(frozen=True)
class Space:
    """The configurations that reach an aim.

    Free layers are kept, deleted, or in a group of neighbours that becomes one layer: a sum of them, or the attention
    of one with the MLP of one. Which heads or neurons of several layers stay is nothing a configuration says here.

    Attributes:
        kinds: one value per source layer; only layers of one kind are summed.
        aim: layers to keep, and how many at either end are kept as they are.
        largest: layers in the largest group; 1: layers are only deleted.
    """

    kinds: Sequence[Any]
    aim: Aim
    largest: int = 1

    @property
    def layers(self) -> int:
        """Source layers, L."""
        return len(self.kinds)

    @property
    def free(self) -> range:
        """Source layers that protection leaves free.

        Raises:
            PlanError: if they are too few to reach the aim.
        """
        return deletable_layers(self.layers, self.aim)

    @property
    def removed(self) -> int:
        """How many layers the aim takes out."""
        return self.layers - self.aim.layers_out

    def delete(self, gone: Sequence[int]) -> Configuration:
        """Return what is left when these layers are deleted."""
        return keep_layers([layer for layer in range(self.layers) if layer not in gone])

    def list_blocks(self) -> list[Configuration]:
        """Return every deletion of one contiguous block, the deepest first."""
        starts = self.free[: len(self.free) - self.removed + 1]
        return [self.delete(range(first, first + self.removed)) for first in reversed(starts)]

    def draw(self, rng: np.random.Generator) -> Configuration:
        """Draw a deletion, every set of layers equally likely; then up to all of them into groups, if there are any."""
        layers = self.delete(rng.choice(np.array(self.free), self.removed, replace=False).tolist())
        for _ in range(int(rng.integers(0, self.removed + 1)) if self.largest > 1 else 0):
            layers = _join(self, layers, rng) or layers
        return layers

    def mutate(self, layers: Configuration, rng: np.random.Generator) -> Configuration:
        """Change a configuration one to three times, fewer being likelier (as EvoPress draws level switches)."""
        for _ in range(int(rng.integers(1, 4, size=2).min())):
            change = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
            layers = change(self, layers, rng) or layers
        return layers

    def find_deleted(self, layers: Configuration) -> list[int]:
        """Return the source layers that no output layer names."""
        named = {source for layer in layers for source in layer.sources}
        return [source for source in range(self.layers) if source not in named]

    def find_copies(self, layers: Configuration) -> list[int]:
        """Return the free source layers that are kept as they are."""
        return [layer.leader for layer in layers if layer.is_copy and layer.leader in self.free]

    def find_groups(self, layers: Configuration) -> list[MergedLayer]:
        """Return the output layers that are no plain copies."""
        return [layer for layer in layers if not layer.is_copy]

    def average(self, sources: Sequence[int]) -> MergedLayer:
        """Return the mean of neighbours of one kind; the last of them, if they are of several."""
        if len({self.kinds[source] for source in sources}) > 1:
            return MergedLayer((sources[-1],), (1.0,))
        return MergedLayer(tuple(sources), (1.0 / len(sources),) * len(sources))

    def draw_group(self, sources: Sequence[int], rng: np.random.Generator) -> MergedLayer:
        """Draw what a group of neighbours becomes."""
        sources, count = tuple(sources), len(sources)
        alike = len({self.kinds[source] for source in sources}) == 1
        if alike and rng.integers(2):
            leader, share = int(rng.integers(count)), (1.0 / count, LEADING)[int(rng.integers(2))]
            rest = (1.0 - share) / (count - 1)
            return MergedLayer(sources, tuple(share if i == leader else rest for i in range(count)))
        attention, mlp = (sources[int(i)] for i in rng.integers(count, size=2))
        return MergedLayer(sources, attention=(attention,), mlp=(mlp,))


def list_changes(space: Space, layers: Configuration, score: float) -> tuple[Step, ...]:
    """Return one step for every run of deleted layers and for every group, in the order of their layers.

    Args:
        space: of the configuration.
        layers: the configuration.
        score: of the configuration as a whole.
    """
    deleted = [Step(run, (), score, 0.0) for run in _find_runs(space.find_deleted(layers))]
    merged = [
        Step(group.sources[:1], group.sources[1:], score, sum(group.weights[:1], 0.0))
        for group in space.find_groups(layers)
    ]
    return tuple(sorted(deleted + merged, key=lambda step: step.left))


def _find_runs(deleted: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the maximal runs of neighbours among rising layers."""
    runs = groupby(enumerate(deleted), key=lambda pair: pair[1] - pair[0])
    return [tuple(layer for _, layer in run) for _, run in runs]


def _replace(layers: Configuration, gone: Sequence[int], new: Sequence[MergedLayer]) -> Configuration:
    """Take out the output layers that name one of ``gone``, and put others in their places."""
    kept = [layer for layer in layers if not set(layer.sources) & set(gone)]
    return tuple(sorted([*kept, *new], key=lambda layer: layer.sources))


def _exchange(layers: Configuration, gone: Sequence[int], back: Sequence[int]) -> Configuration:
    """Delete copies and restore as many deleted layers."""
    return _replace(layers, gone, keep_layers(back))


def _pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _swap(space: Space, layers: Configuration, rng: np.random.Generator) -> Configuration | None:
    """Restore any deleted layer and delete any copy: EvoPress's level switch. In the middle of a block it splits it."""
    deleted, copies = space.find_deleted(layers), space.find_copies(layers)
    return _exchange(layers, [_pick(rng, copies)], [_pick(rng, deleted)]) if deleted and copies else None


def _move_edge(space: Space, layers: Configuration, rng: np.random.Generator) -> Configuration | None:
    """Let a deleted block grow at one end, and it or another shrink at one end."""
    runs, copies = _find_runs(space.find_deleted(layers)), space.find_copies(layers)
    beside = [edge for run in runs for edge in (run[0] - 1, run[-1] + 1) if edge in copies]
    ends = [edge for run in runs for edge in {run[0], run[-1]}]
    return _exchange(layers, [_pick(rng, beside)], [_pick(rng, ends)]) if beside else None


def _move_block(space: Space, layers: Configuration, rng: np.random.Generator) -> Configuration | None:
    """Delete as long a block elsewhere in the place of a deleted block."""
    runs = _find_runs(space.find_deleted(layers))
    if not runs:
        return None
    run = _pick(rng, runs)
    usable = {*space.find_copies(layers), *run}
    blocks = [range(first, first + len(run)) for first in space.free]
    blocks = [block for block in blocks if usable.issuperset(block) and block[0] != run[0]]
    if not blocks:
        return None
    block = _pick(rng, blocks)
    return _exchange(layers, sorted({*block} - {*run}), sorted({*run} - {*block}))


def _join(space: Space, layers: Configuration, rng: np.random.Generator) -> Configuration | None:
    """Let a neighbour take up a deleted layer: a deletion becomes a group."""
    deleted = set(space.find_deleted(layers))
    found: list[tuple[int, ...]] = []
    for layer in layers:
        if len(layer.sources) < space.largest and layer.sources[0] in space.free:
            front, behind = layer.sources[0] - 1, layer.sources[-1] + 1
            found += [(front, *layer.sources)] if front in deleted else []
            found += [(*layer.sources, behind)] if behind in deleted else []
    if not found:
        return None
    sources = _pick(rng, found)
    return _replace(layers, sources, [space.draw_group(sources, rng)])


def _part(space: Space, layers: Configuration, rng: np.random.Generator) -> Configuration | None:
    """Keep one layer of a group as it is and delete the others."""
    groups = space.find_groups(layers)
    if not groups:
        return None
    sources = _pick(rng, groups).sources
    return _replace(layers, sources, keep_layers([_pick(rng, sources)]))


def _remake(space: Space, layers: Configuration, rng: np.random.Generator) -> Configuration | None:
    """Let a group become something else."""
    groups = space.find_groups(layers)
    if not groups:
        return None
    sources = _pick(rng, groups).sources
    return _replace(layers, sources, [space.draw_group(sources, rng)])


Mutation = Callable[[Space, Configuration, np.random.Generator], Configuration | None]

# What may happen to a configuration, each as likely as the others; None where there is nothing it could change.
MUTATIONS: tuple[Mutation, ...] = (_swap, _move_edge, _move_block, _join, _part, _remake)


def mutate_unseen(
    space: Space, layers: Configuration, seen: set[Configuration], rng: np.random.Generator, tries: int
) -> Iterator[Configuration]:
    """Yield mutations of a configuration that nobody has seen, until so many in a row were known."""
    return _unseen(lambda: space.mutate(layers, rng), seen, tries)


def draw_unseen(
    space: Space, seen: set[Configuration], rng: np.random.Generator, tries: int
) -> Iterator[Configuration]:
    """Yield random configurations that nobody has seen, until so many in a row were known."""
    return _unseen(lambda: space.draw(rng), seen, tries)


def _unseen(make: Callable[[], Configuration], seen: set[Configuration], tries: int) -> Iterator[Configuration]:
    failed = 0
    while failed < tries:
        made = make()
        failed = failed + 1 if made in seen else 0
        if made not in seen:
            yield made
