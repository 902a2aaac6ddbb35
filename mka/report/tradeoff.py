"""Quality against bytes and against time: base, control and candidate in one picture."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mka.evaluation.metrics import HEADLINE, read_fact
from mka.evaluation.scores import EvalReport
from mka.report.control import has_own_control
from mka.report.sizes import find_kind, read_bytes
from mka.report.speeds import SPEEDS, find_range
from mka.report.style import BLUE, INK, LEGEND, MUTED, VERMILION, render_figure, write_heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mka.report.style import Format

Point = tuple[float, float, float]  # in the middle, least, most
_LOOKS = {"base": (MUTED, "s"), "control": (BLUE, "D"), "candidate": (VERMILION, "o")}
_DECODE = SPEEDS["decoding"]


def place_sides(base: EvalReport | None, candidate: EvalReport | None, control: EvalReport | None) -> dict[str, Any]:
    """Return where each side lies: role -> ``quality`` (headline's recovery: worst, and over its texts least and most),
    ``size`` in bytes and ``time``, seconds per decoded token with its range, each None where it is not known.

    Nothing is placed unless base and candidate were measured by the headline on the same texts.
    """
    sides = {"base": base, "control": control if has_own_control(base, control) else None, "candidate": candidate}
    known = {role: report for role, report in sides.items() if report is not None}
    if base is None or candidate is None:
        return {}
    kind = find_kind(*known.values())
    texts = {score.name: score.value for score in base.scores if score.metric == HEADLINE.name}
    placed = {}
    for role, report in known.items():
        values = {score.name: score.value for score in report.scores if score.metric == HEADLINE.name}
        kept = [texts[name] / values[name] for name in texts if values.get(name)]
        if kept and all(map(math.isfinite, kept)):
            quality = (min(kept), min(kept), max(kept))
            placed[role] = {"quality": quality, "size": read_bytes(report, kind), "time": _find_time(report)}
    return placed if {"base", "candidate"} <= set(placed) else {}


def _find_time(report: EvalReport) -> Point | None:
    if not (rate := read_fact(report, _DECODE)):
        return None
    slowest, fastest = find_range(report, _DECODE) or (rate, rate)
    return (1 / rate, 1 / fastest, 1 / slowest)


def draw_tradeoff(placed: Mapping[str, Any], served: bool, form: "Format" = "png") -> bytes:
    """Draw what `place_sides` found: up is better, and further left is smaller or faster.

    Args:
        placed: of `place_sides`, with base and candidate.
        served: whether sizes are as served, in 16 bits.
        form: "png" or "svg".
    """

    def draw(figure: "Figure") -> None:
        bytes_axes, time_axes = (figure.add_axes((left, 0.155, 0.385, 0.61)) for left in (0.085, 0.575))
        kept = [bound for side in placed.values() for bound in side["quality"]]
        low, high = min(kept), max(kept)
        room = 0.12 * max(high - low, 0.02)
        for axes, key, scale, unit in (
            (bytes_axes, "size", 1e-6, f"MB{' as served, 16 bits' if served else ' as stored'}"),
            (time_axes, "time", 1e3, "ms per decoded token, with the range of its rounds"),
        ):
            _draw_panel(axes, placed, key, scale)
            axes.set_ylim(low - room, high + room)
            axes.set_xlabel(unit)
        bytes_axes.set_ylabel(f"base / own {HEADLINE.name}")
        time_axes.set_yticklabels([])
        bytes_axes.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=3, **LEGEND)
        note = "Mark: the text that lost most; line: to the one that lost least. Up and left is better."
        write_heading(figure, "Quality against bytes and time", note)

    return render_figure(draw, (8.6, 3.5), form)


def _draw_panel(axes: "Axes", placed: Mapping[str, Any], key: str, scale: float) -> None:
    ends = [0.0]
    for role, side in placed.items():
        if side[key] is None:
            continue
        colour, marker = _LOOKS[role]
        x, left, right = (scale * value for value in (side[key] if isinstance(side[key], tuple) else (side[key],) * 3))
        y, bottom, top = side["quality"]
        axes.plot([x, x], [bottom, top], color=colour, linewidth=1.6)
        axes.plot([left, right], [y, y], color=colour, linewidth=1.6)
        axes.plot([x], [y], marker, color=colour, markersize=7.5, label=role, linestyle="none")
        ends.append(right)
    if len(ends) == 1:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=INK)
    axes.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    axes.set_xlim(0, 1.08 * max(ends) or 1)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
