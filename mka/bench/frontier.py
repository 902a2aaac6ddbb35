"""Quality against bytes: which models of a comparison nothing smaller equals."""

from collections.abc import Iterable
from dataclasses import dataclass

from mka.bench.statistics import BASE, Comparison, Estimate
from mka.bench.tables import Table, format_estimate


@dataclass(frozen=True)
class Point:
    """One model on one text.

    Attributes:
        row: of the tables; `BASE` for the base.
        layers: that remain.
        nbytes: of its tensors.
        ratio: its figure over the base's.
        beaten_by: a model that is no larger and no worse, and better in one of these: of several the best; None if
            there is none.
    """

    row: str
    layers: int
    nbytes: int
    ratio: Estimate
    beaten_by: str | None = None


def find_frontier(comparison: Comparison, check: str) -> list[Point]:
    """Return the base and every cell that has the figures of a group, the smallest first.

    Who is beaten is told by the point estimates; intervals of models that are close may say otherwise.
    """
    base = comparison.results.base
    points = [Point(BASE, comparison.results.bench.base.layers, base.facts["bytes"], Estimate(1.0, 1.0, 1.0))]
    for (row, layers), ratio in comparison.ratios[check].items():
        points.append(Point(row, layers, comparison.cells[row, layers].facts["bytes"], ratio))
    sign = -1 if comparison.groups[check].metric.higher_is_better else 1
    judged = [Point(p.row, p.layers, p.nbytes, p.ratio, _find_better(p, points, sign)) for p in points]
    return sorted(judged, key=lambda p: (p.nbytes, sign * p.ratio.value))


def _find_better(point: Point, others: Iterable[Point], sign: int) -> str | None:
    own = (point.nbytes, sign * point.ratio.value)
    beat = [
        o for o in others if (at := (o.nbytes, sign * o.ratio.value)) != own and all(a <= b for a, b in zip(at, own))
    ]
    best = min(beat, key=lambda o: (sign * o.ratio.value, o.nbytes), default=None)
    return f"{best.row}, {best.layers} layers" if best else None


def tabulate_frontier(comparison: Comparison, check: str) -> Table:
    """Lay out the models by their size; those that nothing beats are bold."""
    rows = []
    for point in find_frontier(comparison, check):
        shown = "1" if point.row == BASE else format_estimate(point.ratio)
        cells = [f"{point.nbytes / 1e6:.1f}", point.row, str(point.layers), shown]
        rows.append([cell if point.beaten_by else f"**{cell}**" for cell in cells] + [point.beaten_by or "–"])
    return ["MB", "method", "layers", f"{comparison.groups[check].metric.name} / base's", "beaten by"], rows
