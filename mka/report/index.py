"""One page of every recompression the registry remembers: what came out, what is in use, who moved an alias and why."""

import base64
import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from mka.evaluation.metrics import HEADLINE, METRICS, read_check, shorten_check
from mka.outside.printable import make_page
from mka.report.decision import MEANINGFUL
from mka.report.index_plots import group_by_model, plot_models
from mka.report.verdict import VERDICTS
from mka.store.publishing import write_text

CHAMPION = "champion"


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


@dataclass(frozen=True)
class Recovery:
    """How much of the base was left in one check of the gate; 1 is as good as the base.

    Attributes:
        name: the gate's check, see `mka.evaluation.metrics.Group.check`.
        value: point estimate.
        lower, upper: one-sided 95 % bounds; None where none was recorded.
        threshold: what the gate asked of the lower bound; None where that was not recorded.
    """

    name: str
    value: float
    lower: float | None = None
    upper: float | None = None
    threshold: float | None = None

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
        size, base_size: bytes of the candidate and of its base, as served in 16 bits if both are known so, else as
            stored.
        decode, base_decode: tokens per second, decoding: the slowest round, the median, the fastest; one figure three
            times where no range was recorded.
        command: does the same again.
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
    size: float | None = None
    base_size: float | None = None
    decode: tuple[float, float, float] | None = None
    base_decode: tuple[float, float, float] | None = None
    command: str = ""
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
    def size_left(self) -> float | None:
        """Bytes as a share of the base's."""
        return None if self.size_ratio is None else 1 - self.size_ratio

    @property
    def time_left(self) -> float | None:
        """Time per decoded token as a share of the base's."""
        return self.base_decode[1] / self.decode[1] if self.base_decode and self.decode else None

    @property
    def is_demonstration(self) -> bool:
        """Whether the gate asked for less of the base than means something."""
        return any(r.threshold is not None and r.threshold < MEANINGFUL for r in self.recoveries)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """What to type: how this very version is loaded and moved, or made again where it has none; title and line."""
        again = [("run it again", self.command)] if self.command else []
        if self.version is None:
            return again
        name, address = shlex.quote(self.name), f"models:/{self.name}/{self.version}"
        loading = f"import mlflow; model = mlflow.pyfunc.load_model({address!r})"
        back, ahead = (
            f"mka rollback {name} --because TEXT",
            f"mka promote {name} --version {self.version} --because TEXT",
        )
        move = ("roll back", back) if self.is_champion else ("promote", ahead)
        return [move, ("load it in Python", loading), *again]

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


def _rank(check: str) -> tuple[bool, int]:
    """Texts before what is pooled, then as the table of metrics has them; last what it no longer has."""
    metric, names = read_check(check), list(METRICS)
    return (metric is not None and metric.pooled is not None, names.index(metric.name) if metric else len(names))


def _version_number(version: str | None) -> int:
    return int(version) if version and version.isdigit() else 0
