"""Pictures of a run: what looked similar, what was merged, what was recovered. PNG or SVG, as bytes.

No meaning hangs on colour alone: removed layers carry a cross, verdicts a marker shape.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mka.errors import PlanError
from mka.plan.wording import label_sources
from mka.report.style import (
    AMBER,
    BLUE,
    FAINT,
    GREEN,
    INK,
    LEGEND,
    MUTED,
    ON_DARK,
    ON_LIGHT,
    PAPER,
    VERMILION,
    Format,
    render_figure,
    write_heading,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mka.plan.plan import MergePlan


Rows = Sequence[Mapping[str, Any]]

# On every page the same, as the text on them is; only on the fifth is that light.
GROUPS = ("#e69f01", "#56b4ea", "#009e74", "#cc79a7", "#0072b3", "#f0e442")
VERDICTS = {"pass": (GREEN, "o"), "fail": (VERMILION, "X"), "undecided": (AMBER, "D")}
UNIT, ROW = 0.32, 1.45  # inches: pitch of the boxes in a plan, height of one of its rows


def draw_similarity(
    values: "np.ndarray", plan: "MergePlan", title: str, meaning: str = "score", form: Format = "png"
) -> bytes:
    """Draw what the method saw of the layers, with what the plan made of it: merged outlined, removed crossed out.

    Args:
        values: pairwise scores (L, L), symmetric, NaN where none was computed; or per-layer importance (L,).
        plan: of the same L layers.
        title: first line.
        meaning: second line: what a value is, with its range or ceiling in parentheses. What stands before the
            parentheses names the colour bar or the axis.
        form: "png" or "svg".

    Raises:
        PlanError: if the scores are not of as many layers as the plan.
    """
    import numpy as np

    values = np.asarray(values, dtype=float)
    count = plan.layers_in
    label = meaning.split(" (")[0].split(",")[0]
    if values.shape == (count, count):
        draw, size = _heat_map, (7.6, 8.95)
    elif values.shape == (count,):
        draw, size = _importance, (min(11.0, max(7.6, 0.2 * count)), 3.8)
    else:
        raise PlanError(f"scores have shape {values.shape}; allowed for this plan: ({count}, {count}), ({count},)")
    return render_figure(lambda figure: draw(figure, values, plan, title, label, meaning), size, form)


def _heat_map(figure: "Figure", values: "np.ndarray", plan: "MergePlan", title: str, label: str, note: str) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    count = plan.layers_in
    left, width, base = 0.085, 0.76, 0.245
    height = width * figure.get_figwidth() / figure.get_figheight()
    heat = figure.add_axes((left, base, width, height))
    strip = figure.add_axes((left, 0.055, width, 0.125))
    # The diagonal is a layer against itself: it would eat the scale that neighbours need.
    others = values[~np.eye(count, dtype=bool) & np.isfinite(values)]
    low = float(others.min()) if others.size else 0.0
    high = float(others.max()) if others.size and others.max() > low else low + 1
    colours = colormaps["YlGnBu"].with_extremes(bad="#e9ebee")
    image = heat.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    above = bool((np.nan_to_num(values, nan=low) > high + 1e-9).any())
    place = figure.add_axes((left + width + 0.025, base, 0.022, height))
    bar = figure.colorbar(image, cax=place, extend="max" if above else "neither")
    bar.set_label(f"{label}; scale spans the values off the diagonal", labelpad=6)

    halo = [withStroke(linewidth=3.6, foreground=PAPER)]
    outline = {"fill": False, "edgecolor": VERMILION, "linewidth": 1.8, "path_effects": halo}
    for index, layer in enumerate(plan.merged):
        first, side = layer.sources[0] - 0.5, layer.sources[-1] - layer.sources[0] + 1
        name = None if index else "merged into one layer"
        heat.add_patch(Rectangle((first, first), side, side, label=name, **outline))
    if plan.removed:
        cross = {"color": VERMILION, "linestyle": "none", "markeredgewidth": 1.6, "path_effects": halo}
        size = max(3.0, min(6.5, 200.0 / count))
        heat.plot(plan.removed, plan.removed, marker="x", markersize=size, label="removed", **cross)
    if not plan.is_identity:
        heat.legend(loc="lower right", bbox_to_anchor=(1, 1.002), ncols=2, **LEGEND)
    heat.set_ylabel("source layer (0-based)")

    tints = [BLUE] * (count - 1)
    for layer in plan.merged:
        tints[layer.sources[0] : layer.sources[-1]] = [VERMILION] * (layer.sources[-1] - layer.sources[0])
    floor = min(0.0, low)
    adjacent = np.nan_to_num(np.diagonal(values, 1), nan=floor) - floor
    strip.bar(np.arange(count - 1) + 0.5, adjacent, bottom=floor, width=0.72, color=tints)
    strip.set_xlim(-0.5, count - 0.5)
    strip.set_xlabel("source layer (0-based); a bar between two ticks is that pair of neighbours")
    strip.set_title(f"neighbours only: {label}", loc="left", fontsize=8, color=MUTED, pad=4)
    _grid(strip, "y")
    for axis in (heat.xaxis, heat.yaxis, strip.xaxis):
        _number_layers(axis, plan)
    write_heading(figure, title, note)


def _importance(figure: "Figure", values: "np.ndarray", plan: "MergePlan", title: str, label: str, note: str) -> None:
    import numpy as np

    axes = figure.add_axes((0.085, 0.135, 0.895, 0.62))
    removed = set(plan.removed)
    merged = {source for layer in plan.merged for source in layer.sources} - removed
    kept = set(range(plan.layers_in)) - merged - removed
    for group, colour, name in ((kept, BLUE, "kept"), (merged, AMBER, "merged"), (removed, VERMILION, "removed")):
        if group:
            look = {"color": colour, "edgecolor": PAPER, "hatch": "////" if name == "removed" else None, "label": name}
            axes.bar(sorted(group), np.nan_to_num(values[sorted(group)]), width=0.76, **look)
    axes.set_xlim(-0.7, plan.layers_in - 0.3)
    axes.set_xlabel("source layer (0-based)")
    axes.set_ylabel(label)
    _number_layers(axes.xaxis, plan)
    _grid(axes, "y")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=3, **LEGEND)
    write_heading(figure, title, note)


def draw_plan(plan: "MergePlan", form: Format = "png") -> bytes:
    """Draw which source layers (top) make each output layer (below): a line per source, its width the share.

    Output layers sit under the mean position of their sources, so that a gap is what vanished. Long models wrap into
    rows of about 32 source layers, never inside a merged group.
    """
    rows = _wrap(plan, 32)
    longest = max(last - first for first, last in rows)
    size = (max(7.6, UNIT * longest + 1.5), ROW * len(rows) + 0.95)
    return render_figure(lambda figure: _plan_rows(figure, plan, rows), size, form)


def _wrap(plan: "MergePlan", most: int) -> list[tuple[int, int]]:
    """Split the source layers into balanced half-open rows that do not cut a merged group."""
    pieces = math.ceil(plan.layers_in / most)
    inside = {i for layer in plan.merged for i in range(layer.sources[0] + 1, layer.sources[-1] + 1)}
    cuts = [0]
    for piece in range(1, pieces):
        cut = round(piece * plan.layers_in / pieces)
        while cut in inside:
            cut -= 1
        if cut > cuts[-1]:
            cuts.append(cut)
    return list(zip(cuts, [*cuts[1:], plan.layers_in]))


def _plan_rows(figure: "Figure", plan: "MergePlan", rows: list[tuple[int, int]]) -> None:
    from matplotlib.patches import FancyBboxPatch

    across, tall = figure.get_size_inches() - (0, 0.72)
    axes = figure.add_axes((0, 0, 1, tall / (tall + 0.72)))
    axes.set_axis_off()
    # One data unit is the pitch of the boxes, in both directions, whatever the model's size.
    axes.set_xlim(-1.25 / UNIT, (across - 1.25) / UNIT)
    axes.set_ylim(0.1 - tall / UNIT, 0.1)

    def box(x: float, y: float, text: str, face: str, ghost: bool = False) -> None:
        edge = VERMILION if ghost else MUTED if face == PAPER else INK
        look = {"facecolor": face, "edgecolor": edge, "linewidth": 0.8, "linestyle": (0, (2, 1.4)) if ghost else "-"}
        axes.add_patch(FancyBboxPatch((x - 0.4, y - 0.4), 0.8, 0.8, "round,pad=0,rounding_size=0.14", zorder=3, **look))
        ink = INK if face == PAPER else ON_DARK if face == GROUPS[4] else ON_LIGHT
        axes.text(x, y - 0.02, text, ha="center", va="center", fontsize=7.5, color=ink, zorder=4)

    tints = {s: GROUPS[i % len(GROUPS)] for i, layer in enumerate(plan.merged) for s in layer.sources}
    for row, (first, last) in enumerate(rows):
        top = -0.55 - row * ROW / UNIT
        bottom = top - 2.8
        axes.text(-0.75, top, "source", ha="right", va="center", color=MUTED, fontsize=8)
        axes.text(-0.75, bottom, "output", ha="right", va="center", color=MUTED, fontsize=8)
        for source in range(first, last):
            gone = source in plan.removed
            box(source - first, top, str(source), PAPER if gone else tints.get(source, PAPER), ghost=gone)
            if gone:
                axes.plot(source - first, top - 0.74, "x", color=VERMILION, markersize=5, markeredgewidth=1.5)
        for output, layer in enumerate(plan.layers):
            if not first <= layer.sources[0] < last:
                continue
            centre = sum(layer.sources) / len(layer.sources) - first
            tint = tints.get(layer.sources[0])
            box(centre, bottom, str(output), tint or PAPER)
            for source, share, text in label_sources(layer):
                ends = ([source - first, centre], [top - 0.4, bottom + 0.4])
                axes.plot(*ends, color=tint or FAINT, linewidth=1 + 3.5 * abs(share), zorder=1)
                if tint:
                    look = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
                    axes.text(source - first, top - 0.72, text, ha="center", va="center", fontsize=6.2, bbox=look)
    title = f"{plan.layers_in} source layers → {plan.layers_out} output layers"
    halves = any(layer.verb == "take" for layer in plan.merged)
    given = "what is taken of each (A: attention, M: MLP)" if halves else "each source's weight"
    note = f"Layers 0-based. Coloured: merged, with {given}. Grey line: a copy. Dashed, ×: nothing is left."
    write_heading(figure, title, note)


def draw_recovery(checks: Rows, rows: Rows = (), form: Format = "png") -> bytes:
    """Draw recovery with its one-sided 95 % bounds, one line per measurement, and the threshold of each gated one.

    ``checks`` have name, recovery, lower, upper, threshold, verdict and n; ``rows`` lack threshold and verdict.
    """
    lines = [*checks, *rows]
    return render_figure(lambda figure: _recovery(figure, lines), (8.6, 1.35 + 0.42 * max(1, len(lines))), form)


def _recovery(figure: "Figure", lines: Rows) -> None:
    height = figure.get_figheight()
    axes = figure.add_axes((0.245, 0.55 / height, 0.5, 1 - 1.3 / height))
    side = axes.get_yaxis_transform()
    numbers = [[_finite(line.get(key)) for key in ("recovery", "lower", "upper", "threshold")] for line in lines]
    drawn = [value for row in numbers for value in row if value is not None]
    low, high = min([*drawn, 0.9]), max([*drawn, 1.02])
    axes.set_xlim(max(0.0, low - 0.06 * (high - low)), high + 0.06 * (high - low))
    axes.set_ylim(len(lines) - 0.45, -0.55)
    axes.axvline(1.0, color=MUTED, linewidth=1.0, zorder=1)

    def write(x: float, y: float, text: str, small: bool = False) -> None:
        look = {"fontsize": 7, "color": MUTED} if small else {"fontsize": 8.2, "color": INK}
        axes.text(x, y, text, transform=side, ha="right" if x < 0 else "left", va="center", **look)

    for y, (line, (recovery, lower, upper, threshold)) in enumerate(zip(lines, numbers)):
        colour, marker = VERDICTS.get(str(line.get("verdict")), (BLUE, "o"))
        thick = {"linewidth": 2.4, "solid_capstyle": "butt"}
        text = "not measured" if recovery is None else f"{recovery:.3f}"
        if lower is not None:
            # An upper bound that the data do not give is open: the bar runs to the edge.
            end = axes.get_xlim()[1] if upper is None else upper
            axes.plot([lower, end], [y, y], color=colour, zorder=2, **thick)
            axes.plot([lower, end], [y, y], "|", color=colour, markersize=8, markeredgewidth=1.4, zorder=2)
            text += f" [{lower:.3f}, {'open' if upper is None else f'{upper:.3f}'}]"
        if recovery is not None:
            axes.plot([recovery], [y], marker, color=colour, markersize=7.5, markeredgecolor=PAPER, zorder=5)
        if threshold is not None:
            axes.plot([threshold, threshold], [y - 0.34, y + 0.34], color=INK, zorder=4, **thick)
            write(1.025, y + 0.33, f"need ≥ {threshold:g}: {line.get('verdict')}", small=True)
        write(1.025, y, text)
        write(-0.02, y, str(line["name"]))
        write(-0.02, y + 0.33, f"n = {line.get('n', '–')}", small=True)
    axes.set_yticks([])
    axes.set_xlabel("recovery (1 = as good as the base)")
    _grid(axes, "x")
    axes.spines["left"].set_visible(False)
    note = "Thick upright mark: the threshold that the lower bound has to reach."
    write_heading(figure, "Recovery with one-sided 95 % bounds", note)


def _finite(value: Any) -> float | None:
    """The number, or None where there is none to draw."""
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _number_layers(axis: Any, plan: "MergePlan") -> None:
    """Ticks at layer indices, every one up to 40 layers, else every fifth; removed layers stand out."""
    every = 1 if plan.layers_in <= 40 else 5
    ticks = list(range(0, plan.layers_in, every))
    axis.set_ticks(ticks, [str(tick) for tick in ticks], fontsize=6.8)
    axis.set_tick_params(length=2.5, pad=2)
    for tick, text in zip(ticks, axis.get_ticklabels()):
        if tick in plan.removed:
            text.set(color=VERMILION, fontweight="bold")


def _grid(axes: "Axes", along: Literal["x", "y"]) -> None:
    axes.grid(axis=along, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
