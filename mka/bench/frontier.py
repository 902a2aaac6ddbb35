"""Quality against bytes and against time: which models of a comparison nothing cheaper equals."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mka.bench.statistics import BASE, Comparison, Estimate
from mka.bench.tables import Table, format_estimate
from mka.pipeline.target import GAINS


@dataclass(frozen=True)
class Point:
    """One model on one text.

    Attributes:
        row: of the tables; `BASE` for the base.
        layers: that remain.
        nbytes: of its tensors.
        decode_speed: times as fast as the base by what is read for a token, see `mka.pipeline.target`; not measured.
        ratio: its figure over the base's.
        beaten_by: a model that is no dearer and no worse, and better in one of these: of several the best; None if
            there is none.
    """

    row: str
    layers: int
    nbytes: int
    decode_speed: float
    ratio: Estimate
    beaten_by: str | None = None


# What a model costs, by how it is called.
COSTS: dict[str, Callable[[Point], float]] = {
    "bytes": lambda point: point.nbytes,
    "time": lambda point: 1 / point.decode_speed,
}


def find_frontier(comparison: Comparison, check: str, cost: str = "bytes") -> list[Point]:
    """Return the base and every cell that has the figures of a group, the cheapest first.

    Who is beaten is told by the point estimates; intervals of models that are close may say otherwise.

    Args:
        comparison: the cells.
        check: of `Comparison.groups`.
        cost: of `COSTS`.
    """
    base = comparison.results.base
    checkpoint = comparison.results.bench.base
    points = [Point(BASE, checkpoint.layers, base.facts["bytes"], 1.0, Estimate(1.0, 1.0, 1.0))]
    for (row, layers), ratio in comparison.ratios[check].items():
        measured = comparison.cells[row, layers]
        assert measured.cell is not None
        speed = GAINS["decode_speed"](checkpoint, measured.cell.rounded, layers)
        points.append(Point(row, layers, measured.facts["bytes"], speed, ratio))
    sign = -1 if comparison.groups[check].metric.higher_is_better else 1
    place = {id(point): (COSTS[cost](point), sign * point.ratio.value) for point in points}
    judged = [(place[id(p)], replace(p, beaten_by=_find_better(p, points, place))) for p in points]
    return [point for _, point in sorted(judged, key=lambda pair: pair[0])]


def _find_better(point: Point, others: Iterable[Point], place: dict[int, tuple[float, float]]) -> str | None:
    own = place[id(point)]
    beat = [o for o in others if (at := place[id(o)]) != own and all(a <= b for a, b in zip(at, own))]
    best = min(beat, key=lambda o: place[id(o)][::-1], default=None)
    return f"{best.row}, {best.layers} layers" if best else None


def tabulate_frontier(comparison: Comparison, check: str) -> Table:
    """Lay out the models by their size; those that nothing beats are bold."""
    rows = []
    for point in find_frontier(comparison, check):
        shown = "1" if point.row == BASE else format_estimate(point.ratio)
        size = point.nbytes / 1e6
        cells = [
            f"{size:.1f}" if size >= 10 else f"{size:.3f}",
            f"{point.decode_speed:.2f}",
            point.row,
            str(point.layers),
            shown,
        ]
        rows.append([cell if point.beaten_by else f"**{cell}**" for cell in cells] + [point.beaten_by or "–"])
    return ["MB", "decodes", "method", "layers", f"{comparison.groups[check].metric.name} / base's", "beaten by"], rows
