"""Figures of a comparison with their intervals: every model is resampled alike, so what all find hard cancels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mka.bench.parts import Measured
from mka.bench.results import Results
from mka.evaluation.bootstrap import find_bounds, resample_rates, resample_recovery
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
class TextDraws:
    """Resampled perplexities of several models on one text.

    Attributes:
        names: of the models, K.
        rates: nats per token, (K,).
        draws: the same in bootstrap resamples of the windows, (R, K).
        windows: number of windows.
    """

    names: tuple[str, ...]
    rates: NDArray[np.float64]
    draws: NDArray[np.float64]
    windows: int

    def ratio(self, name: str, divisor: str = BASE) -> Estimate:
        """Perplexity of one model over that of another.

        ``exp`` of the difference of nats per token; bounds by the expanded percentile bootstrap (see
        `mka.evaluation.gate.decide`) with 2.5 % outside each.
        """
        top, bottom = self.names.index(name), self.names.index(divisor)
        with np.errstate(over="ignore"):
            value = np.exp(self.rates[top] - self.rates[bottom])
            lower, upper = find_bounds(np.exp(self.draws[:, top] - self.draws[:, bottom]), self.windows, TAIL)
        return Estimate(float(value), lower, upper)


def draw_text(scores: Mapping[str, Score], *, seed: int, resamples: int) -> TextDraws:
    """Resample the windows of one text for several models at once.

    Raises:
        GuardError: if the scores are not of the same windows.
        NumericsError: if one is not finite.
    """
    rates, draws = resample_rates(list(scores.values()), seed=seed, resamples=resamples)
    return TextDraws(tuple(scores), rates, draws, next(iter(scores.values())).n)


def recover_tasks(base: Sequence[Score], other: Sequence[Score], *, seed: int, resamples: int) -> Estimate:
    """Mean task score of one model over that of another, each task weighing the same; items are resampled in tasks.

    Raises:
        GuardError: if the two were not measured on the same items.
        NumericsError: if the divisor solves nothing.
    """
    value, draws = resample_recovery(list(zip(base, other, strict=True)), seed=seed, resamples=resamples)
    return Estimate(value, *find_bounds(draws, min(score.n for score in base), TAIL))


@dataclass(frozen=True)
class Duel:
    """One of ours against the best of the others, at one target and on one text or over the tasks.

    Attributes:
        ours: row of ours.
        rival: row of the best of the others, by point estimate.
        layers: the target.
        on: name of the text; "tasks" for the mean of the tasks.
        ratio: perplexity of ours over the rival's (below 1: ours is better), or mean task score (above 1).
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
    def draws(self) -> dict[str, TextDraws]:
        """Resampled perplexities per text; a cell goes by its key."""
        recipe = self.results.bench.recipe
        scores: dict[str, dict[str, Score]] = {n: {BASE: s} for n, s in self.results.base.texts.items()}
        for measured in self.results.measured:
            for name, score in measured.texts.items():
                scores[name][_key(measured)] = score
        return {n: draw_text(group, seed=recipe.seed, resamples=recipe.resamples) for n, group in scores.items()}

    @cached_property
    def ratios(self) -> dict[str, dict[tuple[str, int], Estimate]]:
        """Perplexity over the base's: text -> (row, target) -> estimate."""
        return {name: {at: draws.ratio(_key(m)) for at, m in self.cells.items()} for name, draws in self.draws.items()}

    @cached_property
    def recoveries(self) -> dict[tuple[str, int], Estimate]:
        """Mean task score over the base's: (row, target) -> estimate."""
        return {at: self._recover(self.results.base, m) for at, m in self.cells.items() if m.tasks}

    @cached_property
    def duels(self) -> list[Duel]:
        """Ours against the best of the others, text by text and target by target, then over the tasks."""
        found = []
        for name, draws in self.draws.items():
            for row, rival, layers in self._pair(self.ratios[name], 1):
                ratio = draws.ratio(_key(self.cells[row, layers]), _key(self.cells[rival, layers]))
                found.append(Duel(row, rival, layers, name, ratio, _judge(ratio, below=True)))
        for row, rival, layers in self._pair(self.recoveries, -1):
            ratio = self._recover(self.cells[rival, layers], self.cells[row, layers])
            found.append(Duel(row, rival, layers, "tasks", ratio, _judge(ratio, below=False)))
        return found

    def _recover(self, base: Measured, other: Measured) -> Estimate:
        recipe = self.results.bench.recipe
        return recover_tasks(base.tasks, other.tasks, seed=recipe.seed, resamples=recipe.resamples)

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


def _judge(ratio: Estimate, *, below: bool) -> str:
    if not ratio.excludes_one:
        return "equal" if ratio.lower == ratio.upper else "undecided"
    return "better" if (ratio.upper < 1) == below else "worse"
