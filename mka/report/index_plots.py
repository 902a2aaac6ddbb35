"""The index page's plots: recovery against layers, bytes and time, a dot for every recompression, as pixels for SVG."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mka.report.recompression import Recompression

# A plot, in pixels: size, and what the axes take of it on the left, right, top and bottom.
WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 40, 22, 16, 44


@dataclass(frozen=True)
class Axis:
    """What recovery is drawn against.

    Attributes:
        name: in headings and descriptions.
        label: under the axis.
        read: the share of a recompression; None where it is not on record.
        starts: the least right end of the axis.
    """

    name: str
    label: str
    read: Callable[["Recompression"], float | None]
    starts: float


AXES = (
    Axis("layers", "layer ratio: share of layers removed", lambda row: row.layer_ratio, 0.1),
    Axis("bytes", "bytes, as a share of the base's", lambda row: row.size_left, 1.0),
    Axis("time", "time per decoded token, as a share of the base's", lambda row: row.time_left, 1.0),
)


def plot_recoveries(rows: Sequence["Recompression"], axis: Axis = AXES[0]) -> list[dict[str, Any]]:
    """Place a dot for every recompression that has a recovery and the axis's share, in one plot per registered model.

    All plots of an axis share their scales. y is the recovery of the text that lost most.

    Returns:
        per model its ``name``, ``dots`` (``row``, its ``index`` in ``rows``, ``worst``, and pixels ``x``, ``y`` and, of
        the ends of its bounds, ``low`` and ``high``), ``missing`` (how many have no figures), the ``x`` and ``y`` ticks
        as pixel and label, the ``label`` under the axis, and what the axes need.
    """
    shown = [
        (index, row, row.worst, share)
        for index, row in enumerate(rows)
        if row.worst and (share := axis.read(row)) is not None and math.isfinite(row.worst.value)
    ]
    if not shown:
        return []
    right = max(axis.starts, math.ceil(10 * max(share for *_, share in shown)) / 10)
    # A bound far above the base would press everything else to the floor; its line leaves the plot then.
    tops = [max(worst.value, worst.upper or 0) for _, _, worst, _ in shown]
    top = min(2.0, max(1.1, math.ceil(10 * max(tops)) / 10))

    def across(share: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * max(share, 0) / right, 1)

    def up(recovery: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(recovery, 0), top) / top), 1)

    step = 0.05 if right <= 0.3 else 0.1 if right <= 0.8 else 0.2 if right <= 1.6 else 0.5
    axes = {
        "axis": axis,
        "x": [(across(i * step), f"{100 * i * step:.0f} %") for i in range(int(right / step + 1e-9) + 1)],
        "y": [(up(i / 5), f"{i / 5:.1f}") for i in range(int(5 * top + 1e-9) + 1)],
        "even": up(1.0),
        "size": (WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM),
    }
    dots: list[dict[str, Any]] = []
    for index, row, worst, share in shown:
        low, high = (worst.value if bound is None else bound for bound in (worst.lower, worst.upper))
        place = {"x": across(share), "y": up(worst.value), "low": up(low), "high": up(high)}
        dots.append({"row": row, "index": index, "worst": worst, **place})
    # The champion is drawn last, over what lies at the same place.
    dots.sort(key=lambda dot: dot["row"].is_champion)
    plots = []
    for name, group in group_by_model(rows):
        own = [dot for dot in dots if dot["row"].name == name]
        plots.append({"name": name, "dots": own, "missing": len(group) - len(own), **axes})
    return plots


def plot_models(rows: Sequence["Recompression"]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the plots of every registered model, one per axis of which anything is on record."""
    plots = [plot for axis in AXES for plot in plot_recoveries(rows, axis) if plot["dots"]]
    return [(name, [plot for plot in plots if plot["name"] == name]) for name, _ in group_by_model(rows)]


def group_by_model(items: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """Items by registered model, models by name, items in the order given."""
    return [(name, list(group)) for name, group in groupby(sorted(items, key=lambda i: i.name), lambda i: i.name)]
