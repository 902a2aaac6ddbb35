"""The picture of a comparison: figures over the base's against the layers that remain, a panel per metric and text."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mka.bench.frontier import COSTS, Point, find_frontier
from mka.bench.statistics import BASE, Comparison
from mka.bench.tables import format_ratio
from mka.evaluation.metrics import HEADLINE
from mka.report.style import FAINT, INK, LEGEND, MUTED, VERMILION, Format, render_figure, write_heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The rest of Okabe and Ito's set, and marks that tell rows apart without it.
TINTS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#6a737d", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
OURS_MARKS, OURS_LINES = ("*", "p", "d", "8"), ("-", "--", ":", "-.")
PANEL, LEFT, RIGHT, GAP = 3.5, 0.75, 0.2, 0.35  # inches
TOP, BOTTOM, TALL, LEGEND_ROW = 0.95, 0.5, 3.3, 0.2
# Of a second row of panels.
BELOW = 0.15
# Inches of a legend's marker and of a letter of its names; no picture is narrower than its heading.
MARKER, LETTER, NARROWEST = 0.55, 0.061, 8.0
EXPECTED = "time of a token, the base's is 1 (by arithmetic)"
# Top of the axis: what is above it is no use as a model, and would press the rest together.
HIGHEST = 40.0
# Width over which the rows of one target are spread, of the distance to the next target.
SPREAD = 0.3


def draw_comparison(comparison: Comparison, form: Format = "png") -> bytes:
    """Draw every cell with its 95 % interval; the axis of ratios is logarithmic, ours are red, thick and on top.

    Rows are shifted a little to the side so that their bars do not hide each other. Missing cells are left out.
    """
    lefts = _place_panels(comparison)
    wide, columns, rows = _fit_legend(comparison, max(lefts.values()) + PANEL + RIGHT)
    size = (wide, TOP + TALL + BOTTOM + 0.15 + LEGEND_ROW * rows)
    return render_figure(lambda figure: _panels(figure, comparison, lefts, columns), size, form)


def _place_panels(comparison: Comparison) -> dict[str, float]:
    """Left edge of each panel in inches, texts of one metric side by side."""
    lefts: dict[str, float] = {}
    before = None
    for check, group in comparison.list_groups("texts").items():
        gap = GAP if before == group.metric else LEFT
        lefts[check] = (max(lefts.values()) + PANEL if lefts else 0.0) + gap
        before = group.metric
    return lefts


def _fit_legend(comparison: Comparison, wide: float) -> tuple[float, int, int]:
    """Return the width a picture has to have, and columns and rows of its legend: what is rounded has a long name."""
    named = MARKER + LETTER * max(map(len, comparison.rows))
    wide = max(wide, named + RIGHT, NARROWEST)
    columns = min(max(1, int(wide / named)), len(comparison.rows))
    return wide, columns, -(-len(comparison.rows) // columns)


def _panels(figure: "Figure", comparison: Comparison, lefts: Mapping[str, float], columns: int) -> None:
    wide, tall = figure.get_size_inches()
    looks = _choose_looks(comparison)
    kinds = {text.name: "kind seen" if text.seen else "kind not seen" for text in comparison.results.bench.recipe.texts}
    lines: dict[str, Any] = {}
    named: set[str] = set()
    ways = {comparison.groups[check].metric.higher_is_better for check in lefts}
    mixed = len(ways) > 1
    beyond = 0.0
    for check, left in lefts.items():
        group, ratios = comparison.groups[check], comparison.ratios[check]
        metric = group.metric
        values = [e for at in lefts if comparison.groups[at].metric == metric for e in comparison.ratios[at].values()]
        high = min(max([e.upper for e in values] + [1.2]), HIGHEST)
        low = max(min([e.lower for e in values] + [1.0]), 1 / HIGHEST)
        if (highest := max([e.value for e in values], default=1.0)) > high:
            beyond = max(beyond, highest)
        axes = figure.add_axes((left / wide, 1 - (TOP + TALL) / tall, PANEL / wide, TALL / tall))
        axes.set_yscale("log")
        axes.set_ylim(low / 1.06, high * 1.12)
        for position, row in enumerate(comparison.rows):
            at = [(target, ratios[row, target]) for target in comparison.targets if (row, target) in ratios]
            if not at:
                continue
            shift = (0.5 - position / max(1, len(comparison.rows) - 1)) * SPREAD * _spacing(comparison)
            x = [target + shift for target, _ in at]
            y = [e.value for _, e in at]
            below, above = [e.value - e.lower for _, e in at], [e.upper - e.value for _, e in at]
            lines[row] = axes.errorbar(x, y, yerr=[below, above], label=row, **looks[row])
        title = f"{group.on} ({kinds[group.on]}, n = {comparison.draws[check].n} {metric.resampled})"
        _dress(axes, comparison, title)
        if metric.name not in named:
            way = "higher" if metric.higher_is_better else "lower"
            axes.set_ylabel(f"{metric.name} / base's (log scale{f', {way} is better' if mixed else ''})")
            named.add(metric.name)
    shown = [row for row in comparison.rows if row in lines]
    where = {
        "loc": "lower center",
        "bbox_to_anchor": (0.5, 0.06 / tall),
        "ncols": columns,
    }
    figure.legend([lines[row] for row in shown], shown, **LEGEND, **where)
    way = "" if mixed else "Higher is better; " if ways == {True} else "Lower is better; "
    note = f"{way}1 is as good as the base. Bars: 95 % intervals, paired bootstrap over windows."
    if beyond:
        note += f" Lines that leave the frame go on to at most {format_ratio(beyond)}."
    write_heading(figure, f"Depth compression of {comparison.results.bench.recipe.model.label}", note)


def draw_frontiers(comparison: Comparison, form: Format = "png") -> bytes:
    """Draw every cell with its interval against bytes and against time, a panel per text; what is beaten is grey."""
    checks = [check for check, group in comparison.list_groups("texts").items() if group.metric == HEADLINE]
    wide, columns, rows = _fit_legend(comparison, LEFT + len(checks) * (PANEL + GAP) - GAP + RIGHT)
    size = (wide, TOP + len(COSTS) * (TALL + BOTTOM) + BELOW + 0.15 + LEGEND_ROW * rows)
    return render_figure(lambda figure: _frontiers(figure, comparison, checks, columns), size, form)


def _frontiers(figure: "Figure", comparison: Comparison, checks: list[str], columns: int) -> None:
    wide, tall = figure.get_size_inches()
    panel = (wide - LEFT - RIGHT + GAP) / len(checks) - GAP
    looks, lines = _choose_looks(comparison), dict[str, Any]()
    highest = max((ratio.upper for check in checks for ratio in comparison.ratios[check].values()), default=1.2)
    for floor, (cost, told) in enumerate({"bytes": "megabytes of tensors", "time": EXPECTED}.items()):
        for place, check in enumerate(checks):
            left, top = LEFT + place * (panel + GAP), TOP + TALL + floor * (TALL + BOTTOM + BELOW)
            axes = figure.add_axes((left / wide, 1 - top / tall, panel / wide, TALL / tall))
            points = find_frontier(comparison, check, cost)
            axes.set_yscale("log")
            axes.set_ylim(0.97, min(max(highest, 1.2), HIGHEST) * 1.12)
            _place_points(axes, points, looks, lines, cost)
            axes.set_xlabel(told)
            title = f"{comparison.groups[check].on} (n = {comparison.draws[check].n} windows)"
            _dress_ratios(axes, "" if floor else title)
            if not place:
                axes.set_ylabel(f"{HEADLINE.name} / base's (log scale)")
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.06 / tall), "ncols": columns}
    shown = [row for row in comparison.rows if row in lines]
    figure.legend([lines[row] for row in shown], shown, **LEGEND, **where)
    note = "Lower left is better. Numbers: layers. Grey: something no dearer is no worse. Black: the base."
    write_heading(figure, f"Depth and bits of {comparison.results.bench.recipe.model.label}", note)


def _place_points(
    axes: "Axes", points: Sequence[Point], looks: Mapping[str, Any], lines: dict[str, Any], cost: str
) -> None:
    """Draw the points of one panel; ``lines`` gets what the legend shows of each row, in colour if it has any."""
    scale = 1e6 if cost == "bytes" else 1.0
    for point in points:
        x, y = COSTS[cost](point) / scale, point.ratio.value
        if point.row == BASE:
            axes.plot([x], [1.0], "o", color=INK, markersize=6, zorder=5)
            continue
        look = looks[point.row] | {"linestyle": "none"} | ({"color": FAINT, "zorder": 2} if point.beaten_by else {})
        bar = [[y - point.ratio.lower], [point.ratio.upper - y]]
        drawn = axes.errorbar([x], [y], yerr=bar, label=point.row, **look)
        lines[point.row] = lines.get(point.row, drawn) if point.beaten_by else drawn
        nudge: dict[str, Any] = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 6.5}
        axes.annotate(str(point.layers), (x, y), **nudge, color=MUTED)
    front = [(COSTS[cost](point) / scale, point.ratio.value) for point in points if not point.beaten_by]
    axes.plot(*zip(*front), color=MUTED, linewidth=0.8, zorder=1, drawstyle="steps-post")


def _choose_looks(comparison: Comparison) -> dict[str, dict[str, Any]]:
    looks: dict[str, dict[str, Any]] = {}
    ours = others = 0
    for row in comparison.rows:
        if row in comparison.ours:
            look = {"color": VERMILION, "marker": OURS_MARKS[ours % len(OURS_MARKS)], "markersize": 9, "linewidth": 2.2}
            look |= {"linestyle": OURS_LINES[ours % len(OURS_LINES)], "zorder": 6}
            ours += 1
        else:
            look = {"color": TINTS[others % len(TINTS)], "marker": MARKS[others % len(MARKS)], "markersize": 4.5}
            # The tints begin again with broken lines.
            look |= {"linewidth": 1.0, "zorder": 3, "linestyle": "--" if others // len(TINTS) % 2 else "-"}
            others += 1
        looks[row] = look | {"capsize": 2, "elinewidth": 0.9, "markeredgecolor": "white", "markeredgewidth": 0.5}
    return looks


def _spacing(comparison: Comparison) -> float:
    """Least distance of two targets; 1 if there is one."""
    targets = sorted(comparison.targets)
    return float(min((b - a for a, b in pairwise(targets)), default=1))


def _dress(axes: "Axes", comparison: Comparison, title: str) -> None:
    targets = comparison.targets
    margin = 0.5 * _spacing(comparison)
    # Fewer layers to the right: compression grows along the axis.
    axes.set_xlim(max(targets) + margin, min(targets) - margin)
    axes.set_xticks(targets, [str(target) for target in targets])
    axes.set_xlabel(f"layers that remain, of {comparison.results.bench.base.layers}")
    _dress_ratios(axes, title)


def _dress_ratios(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_title(title, loc="left", fontsize=8.5, color=INK, pad=5)
    top = axes.get_ylim()[1]
    steps = (1.0, 1.1, 1.2, 1.5, 2.0) if top < 2 else (1.0, 1.5, 2.0, 3.0, 5.0) if top < 20 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1.0, color=MUTED, linewidth=1.0, zorder=1)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
