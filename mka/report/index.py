"""One page of every recompression the registry remembers: what came out, what is in use, who moved an alias and why."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mka.evaluation.metrics import HEADLINE, METRICS, read_check, shorten_check
from mka.outside.printable import make_page
from mka.report.verdict import VERDICTS
from mka.store.publishing import write_text

CHAMPION = "champion"
# The plot, in pixels: size, and what the axes take of it on the left, right, top and bottom.
WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 16, 44


@dataclass(frozen=True)
class Recovery:
    """How much of the base was left in one check of the gate; 1 is as good as the base.

    Attributes:
        name: the gate's check, see `mka.evaluation.metrics.Group.check`.
        value: point estimate.
        lower, upper: one-sided 95 % bounds; None where none was recorded.
    """

    name: str
    value: float
    lower: float | None = None
    upper: float | None = None

    @property
    def label(self) -> str:
        """What it is called in a column of them."""
        return shorten_check(self.name)


@dataclass(frozen=True)
class Recompression:
    """One recompression; a figure that was not recorded is None.

    Attributes:
        base_model: label of the base.
        base_revision: its revision.
        name: registered model, or the one it would have become.
        version: its version; None if it was not registered.
        aliases: aliases that point at the version now.
        when: start of the run, with a time zone.
        method, recipe: what made it.
        verdict: of the gate; empty if unknown.
        layers_in, layers_out: decoder layers before and after.
        layer_ratio: 1 - layers_out / layers_in.
        size_ratio: 1 - bytes out / bytes in.
        recoveries: of every check that was recorded, in the order of the table of metrics.
        run, run_id: name and id of the recorded run; empty if it is gone.
        complete: False if registering the version was interrupted.
        report: its report on this machine.
        page: its page on the registry's server.
    """

    base_model: str
    base_revision: str
    name: str
    version: str | None
    aliases: tuple[str, ...]
    when: datetime
    method: str
    recipe: str
    verdict: str
    layers_in: int | None = None
    layers_out: int | None = None
    layer_ratio: float | None = None
    size_ratio: float | None = None
    recoveries: tuple[Recovery, ...] = ()
    run: str = ""
    run_id: str = ""
    complete: bool = True
    report: Path | None = None
    page: str | None = None

    @property
    def is_champion(self) -> bool:
        """Whether the alias "champion" points here."""
        return CHAMPION in self.aliases

    @property
    def worst(self) -> Recovery | None:
        """The text that lost most by the first metric that was recorded; the tasks where none was on texts."""
        return min(self.recoveries, key=lambda recovery: (*_rank(recovery.name), recovery.value), default=None)


@dataclass(frozen=True)
class AliasMove:
    """One move of an alias.

    Attributes:
        name: registered model.
        alias: what moved.
        action: "register", "promote" or "rollback".
        before, after: versions it pointed at; None for none.
        when: None if the record has no readable time.
        who, why: as given by whoever moved it.
    """

    name: str
    alias: str
    action: str
    before: str | None
    after: str | None
    when: datetime | None
    who: str
    why: str


def order_recoveries(found: Iterable[Recovery]) -> tuple[Recovery, ...]:
    """Sort recoveries as a column shows them: texts before what is pooled, metrics as their table has them, names."""
    return tuple(sorted(found, key=lambda recovery: (*_rank(recovery.name), recovery.name)))


def write_index(rows: Iterable[Recompression], path: str | Path, moves: Iterable[AliasMove] = ()) -> Path:
    """Write the page: one HTML file with its style and plots inside, which loads nothing from anywhere.

    Args:
        rows: the recompressions, in any order; the page shows the newest first.
        path: the file; replaced in one step.
        moves: how aliases moved, in any order.

    Raises:
        OutputError: if it cannot be written.
    """
    path = Path(path)
    write_text(path, make_page(render_index(list(rows), list(moves), path.parent)))
    return path


def render_index(rows: Sequence[Recompression], moves: Sequence[AliasMove], folder: Path) -> str:
    """Fill the template; every value is escaped.

    Args:
        rows: the recompressions.
        moves: how aliases moved.
        folder: where the page will lie; links to files start there.
    """
    import jinja2

    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    engine.filters["figure"] = lambda value: "–" if value is None else f"{value:.3f}"
    engine.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    engine.filters["bounds"] = format_bounds
    engine.filters["time"] = lambda when: "–" if when is None else f"{when.astimezone(UTC):%Y-%m-%d %H:%M}"
    engine.filters["link"] = lambda report: link_from(folder, report)
    ordered = sorted(rows, key=lambda row: (row.when, _version_number(row.version)), reverse=True)
    counts = Counter(row.verdict for row in ordered)
    epoch = datetime.fromtimestamp(0, UTC)
    history = sorted(moves, key=lambda move: move.when or epoch, reverse=True)
    return engine.get_template("index.html.j2").render(
        rows=ordered,
        names=list(dict.fromkeys(row.name for row in ordered)),
        counts={verdict: counts[verdict] for verdict in dict.fromkeys([*VERDICTS, *counts]) if counts[verdict]},
        verdicts=VERDICTS,
        headline=HEADLINE.name,
        in_use=_group(sorted((row for row in ordered if row.aliases), key=lambda row: not row.is_champion)),
        plots=plot_recoveries(ordered),
        history=_group(history),
        written=datetime.now(UTC),
    )


def format_bounds(recovery: Recovery) -> str:
    """Write the bounds that are known: both in brackets, or one with the sign that says which."""
    lower, upper = recovery.lower, recovery.upper
    if lower is not None and upper is not None:
        return f"[{lower:.3f}, {upper:.3f}]"
    return f"≥ {lower:.3f}" if lower is not None else f"≤ {upper:.3f}" if upper is not None else ""


def link_from(folder: Path, target: Path) -> str:
    """Address of a file relative to a folder, so that both may move together."""
    return quote(os.path.relpath(target, folder))


def plot_recoveries(rows: Sequence[Recompression]) -> list[dict[str, Any]]:
    """Place a dot for every recompression that has a layer ratio and a recovery, in one plot per registered model.

    All plots share their axes. x is the layer ratio, y the recovery of the text that lost most.

    Returns:
        per model its ``name``, ``dots`` (``row``, its ``index`` in ``rows``, ``worst``, and pixels ``x``, ``y`` and, of
        the ends of its bounds, ``low`` and ``high``), ``missing`` (how many have no figures), the ``x`` and ``y`` ticks
        as pixel and label, and what the axes need.
    """
    shown = [
        (index, row, row.worst, row.layer_ratio)
        for index, row in enumerate(rows)
        if row.worst and row.layer_ratio is not None and math.isfinite(row.worst.value)
    ]
    if not shown:
        return []
    right = max(0.1, math.ceil(10 * max(ratio for *_, ratio in shown)) / 10)
    # A bound far above the base would press everything else to the floor; its line leaves the plot then.
    tops = [max(worst.value, worst.upper or 0) for _, _, worst, _ in shown]
    top = min(2.0, max(1.1, math.ceil(10 * max(tops)) / 10))

    def across(ratio: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * max(ratio, 0) / right, 1)

    def up(recovery: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(recovery, 0), top) / top), 1)

    step = 0.05 if right <= 0.3 else 0.1
    axes = {
        "x": [(across(i * step), f"{100 * i * step:.0f} %") for i in range(round(right / step) + 1)],
        "y": [(up(i / 5), f"{i / 5:.1f}") for i in range(int(5 * top + 1e-9) + 1)],
        "even": up(1.0),
        "size": (WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM),
    }
    dots: list[dict[str, Any]] = []
    for index, row, worst, ratio in shown:
        low, high = (worst.value if bound is None else bound for bound in (worst.lower, worst.upper))
        place = {"x": across(ratio), "y": up(worst.value), "low": up(low), "high": up(high)}
        dots.append({"row": row, "index": index, "worst": worst, **place})
    # The champion is drawn last, over what lies at the same place.
    dots.sort(key=lambda dot: dot["row"].is_champion)
    plots = []
    for name, group in _group(rows):
        own = [dot for dot in dots if dot["row"].name == name]
        plots.append({"name": name, "dots": own, "missing": len(group) - len(own), **axes})
    return plots


def _rank(check: str) -> tuple[bool, int]:
    """Texts before what is pooled, then as the table of metrics has them; last what it no longer has."""
    metric, names = read_check(check), list(METRICS)
    return (metric is not None and metric.pooled is not None, names.index(metric.name) if metric else len(names))


def _version_number(version: str | None) -> int:
    return int(version) if version and version.isdigit() else 0


def _group(items: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """Items by registered model, models by name, items in the order given."""
    return [(name, list(group)) for name, group in groupby(sorted(items, key=lambda i: i.name), lambda i: i.name)]
