"""Figures of a comparison with their intervals: every model is resampled alike, so what all find hard cancels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mka.bench.parts import Measured
from mka.bench.results import Results
from mka.errors import NumericsError
from mka.evaluation.bootstrap import find_bounds, resample_means
from mka.evaluation.metrics import Group, Metric, find_metric, group_scores
from mka.evaluation.scores import Score

TAIL = 0.025
BASE = "base"


@dataclass(frozen=True)
class Estimate:
    """A ratio with its two-sided 95 % interval."""

    value: float
    lower: float
    upper: float

    @property
    def excludes_one(self) -> bool:
        """Whether the interval says which side of 1 it is on."""
        return self.upper < 1 or self.lower > 1


@dataclass(frozen=True)
class Draws:
    """Resampled figures of several models on one text, or on all tasks.

    Attributes:
        metric: what was measured.
        names: of the models, K.
        means: of the items, of several tasks their sum, (K,); see `mka.evaluation.bootstrap.resample_means`.
        draws: the same in bootstrap resamples, (R, K).
        n: windows or items in all.
        smallest: windows, or items of the task that has fewest.
    """

    metric: Metric
    names: tuple[str, ...]
    means: NDArray[np.float64]
    draws: NDArray[np.float64]
    n: int
    smallest: int

    def divides(self, name: str) -> bool:
        """Whether ratios to a model's figure are defined: it is not 0."""
        return self.metric.scale != "linear" or bool(self.means[self.names.index(name)] > 0)

    def ratio(self, name: str, divisor: str = BASE) -> Estimate:
        """Figure of one model over that of another.

        Bounds by the expanded percentile bootstrap (see `mka.evaluation.gate.decide`) with 2.5 % outside each.

        Raises:
            NumericsError: if the divisor's figure is 0.
        """
        top, bottom = self.names.index(name), self.names.index(divisor)
        if not self.divides(divisor):
            raise NumericsError(f"{self.metric.subject}: {divisor} solves nothing, so no ratio to it is defined")
        value = float(self.metric.ratio(self.means[top], self.means[bottom]))
        return Estimate(
            value, *find_bounds(self.metric.ratio(self.draws[:, top], self.draws[:, bottom]), self.smallest, TAIL)
        )


def draw_scores(scores: Mapping[str, Sequence[Score]], *, seed: int, resamples: int) -> Draws:
    """Resample windows or items for several models at once.

    Args:
        scores: model -> its score on one text, or its scores on all tasks in one order.
        seed: of the resampling.
        resamples: bootstrap resamples.

    Raises:
        GuardError: if the scores are not of the same windows or items.
        NumericsError: if one is not finite.
    """
    means, draws = resample_means(list(zip(*scores.values(), strict=True)), seed=seed, resamples=resamples)
    first = next(iter(scores.values()))
    sizes = [score.n for score in first]
    return Draws(find_metric(first[0].metric), tuple(scores), means, draws, sum(sizes), min(sizes))


@dataclass(frozen=True)
class Duel:
    """One of ours against the best of the others, at one target and on one text or over the tasks.

    Attributes:
        ours: row of ours.
        rival: row of the best of the others, by point estimate.
        layers: the target.
        on: label of the group of scores: the text, or "tasks" for the mean of the tasks.
        ratio: figure of ours over the rival's; which side of 1 is better, the metric says.
        verdict: "better" or "worse" if the interval excludes 1, "equal" if it is nothing but 1, else "undecided".
    """

    ours: str
    rival: str
    layers: int
    on: str
    ratio: Estimate
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All figures of a comparison, computed from the items that are stored."""

    results: Results

    @property
    def targets(self) -> list[int]:
        """Layers that remain, most first."""
        return sorted({cell.layers for cell in self.results.bench.recipe.cells}, reverse=True)

    @property
    def rows(self) -> list[str]:
        """Rows of the tables, in the recipe's order."""
        return list(dict.fromkeys(cell.row for cell in self.results.bench.recipe.cells))

    @property
    def ours(self) -> set[str]:
        """Rows that are ours."""
        return {cell.row for cell in self.results.bench.recipe.cells if cell.entry.ours}

    @cached_property
    def cells(self) -> dict[tuple[str, int], Measured]:
        """What was measured, by row and target."""
        return {(m.cell.row, m.cell.layers): m for m in self.results.measured if m.cell is not None}

    @cached_property
    def groups(self) -> dict[str, Group]:
        """What was measured of the base, by what the gate calls it, in the order of the table of metrics."""
        return {group.check: group for group in group_scores(self.results.base.scores.values())}

    @cached_property
    def draws(self) -> dict[str, Draws]:
        """Resampled figures per group; a cell goes by its key."""
        recipe, found = self.results.bench.recipe, {}
        for check, group in self.groups.items():
            there = {BASE: self.results.base} | {_key(m): m for m in self.measured_on(group).values()}
            scores = {name: [measured.scores[key] for key in group.keys] for name, measured in there.items()}
            found[check] = draw_scores(scores, seed=recipe.seed, resamples=recipe.resamples)
        return found

    @cached_property
    def ratios(self) -> dict[str, dict[tuple[str, int], Estimate]]:
        """Figure over the base's: group -> (row, target) -> estimate."""
        return {
            check: {at: self.draws[check].ratio(_key(m)) for at, m in self.measured_on(group).items()}
            for check, group in self.groups.items()
        }

    @cached_property
    def duels(self) -> list[Duel]:
        """Ours against the best of the others, by group and target; left out where those solve nothing."""
        found = []
        for check, draws in self.draws.items():
            below = not draws.metric.higher_is_better
            for row, rival, layers in self._pair(self.ratios[check], 1 if below else -1):
                if not draws.divides(_key(self.cells[rival, layers])):
                    continue
                ratio = draws.ratio(_key(self.cells[row, layers]), _key(self.cells[rival, layers]))
                found.append(Duel(row, rival, layers, self.groups[check].label, ratio, judge_ratio(ratio, below=below)))
        return found

    def list_groups(self, *on: str) -> dict[str, Group]:
        """Those groups that are measured on texts, tasks, or own items, as the metrics' rows say."""
        return {check: group for check, group in self.groups.items() if group.metric.on in on}

    def measured_on(self, group: Group) -> dict[tuple[str, int], Measured]:
        """Cells that have all scores of a group: tasks and generation are measured at some targets only."""
        return {at: m for at, m in self.cells.items() if all(key in m.scores for key in group.keys)}

    def _pair(self, values: Mapping[tuple[str, int], Estimate], sign: int) -> list[tuple[str, str, int]]:
        """Each of ours with the rival that has the least of ``sign`` times the value."""
        pairs = []
        for layers in self.targets:
            there = {row: sign * value.value for (row, target), value in values.items() if target == layers}
            if rivals := [row for row in there if row not in self.ours]:
                pairs += [(row, min(rivals, key=there.__getitem__), layers) for row in there if row in self.ours]
        return pairs


def _key(measured: Measured) -> str:
    assert measured.cell is not None
    return measured.cell.key


def judge_ratio(ratio: Estimate, *, below: bool) -> str:
    """Say whether a ratio is better or worse than 1, "equal" or undecided; see `Duel`."""
    if not ratio.excludes_one:
        return "equal" if ratio.lower == ratio.upper else "undecided"
    return "better" if (ratio.upper < 1) == below else "worse"
