"""One page of every recompression the registry remembers: what came out, what is in use, who moved an alias and why."""

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from mka.evaluation.metrics import HEADLINE
from mka.outside.printable import make_page
from mka.report.decision import MEANINGFUL
from mka.report.index_plots import group_by_model, plot_models
from mka.report.recompression import AliasMove, Recompression, Recovery, rank_check
from mka.report.verdict import VERDICTS
from mka.store.publishing import write_text

# Shows the rows of which the text holds every word that was typed, and their dots. The page's policy lets this script
# run by its digest, and no other.
FILTER = """
const box = document.querySelector("#filter input"), told = document.querySelector("#filter output");
box.parentElement.parentElement.hidden = false;
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const row of document.querySelectorAll("#all tbody > tr[id]")) {
    const text = row.textContent.toLowerCase(), fits = words.every(word => text.includes(word));
    row.hidden = !fits;
    shown += fits;
    for (const dot of document.querySelectorAll(`#plot a[href="#${row.id}"]`)) dot.classList.toggle("out", !fits);
  }
  told.textContent = words.length ? `${shown} shown` : "";
});
"""


def order_recoveries(found: Iterable[Recovery]) -> tuple[Recovery, ...]:
    """Sort recoveries as a column shows them: texts before what is pooled, metrics as their table has them, names."""
    return tuple(sorted(found, key=lambda recovery: (*rank_check(recovery.name), recovery.name)))


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
    from markupsafe import Markup

    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    engine.filters["figure"] = lambda value: "–" if value is None else f"{value:.3f}"
    engine.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    engine.filters["bounds"] = format_bounds
    engine.filters["megabytes"] = lambda value: "–" if value is None else f"{value / 1e6:,.1f} MB"
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
        meaningful=f"{MEANINGFUL:g}",
        in_use=group_by_model(sorted((row for row in ordered if row.aliases), key=lambda row: not row.is_champion)),
        plots=plot_models(ordered),
        filter_script=Markup(FILTER),
        filter_digest=base64.b64encode(hashlib.sha256(FILTER.encode()).digest()).decode(),
        history=group_by_model(history),
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


def _version_number(version: str | None) -> int:
    return int(version) if version and version.isdigit() else 0
