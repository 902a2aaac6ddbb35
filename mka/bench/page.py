"""The page of a comparison, generated whole, and its rows in another."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mka.bench.frontier import tabulate_frontier
from mka.bench.parts import Measured
from mka.bench.statistics import Comparison
from mka.bench.tables import Table, describe_conditions, tabulate_best, tabulate_duels, tabulate_ratios, tabulate_sizes
from mka.errors import OutputError
from mka.evaluation.metrics import HEADLINE, METRICS, Group, Metric
from mka.report.markup import escape_markdown
from mka.report.table import format_value
from mka.store.publishing import write_text
from mka.texts.overlap import SHARED_WORDS

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def render_page(comparison: Comparison, picture: str | None, frontier: str | None = None) -> str:
    """Write the whole page in Markdown.

    Args:
        comparison: the figures.
        picture: address of the picture, relative to the page; None for none.
        frontier: that of the picture of quality against bytes.
    """
    results = comparison.results
    bench = results.bench
    lines = [
        f"# Benchmarks: {escape_markdown(bench.recipe.name)}",
        "",
        f"Written by `{bench.command}` on {datetime.now(UTC):%Y-%m-%d}; edits are lost. Base and candidates were "
        "measured from disk, by stock transformers, on the same windows and items.",
        "",
        *_markdown((["", ""], [[name, text] for name, text in describe_conditions(comparison)])),
        *_markdown(_texts_table(comparison)),
    ]
    if picture:
        lines += [f"![{HEADLINE.name.capitalize()} over the base's against layers that remain]({picture})", ""]
    lines += _text_sections(comparison)
    for check, group in comparison.list_groups("tasks").items():
        if comparison.ratios[check]:
            scores = [results.base.scores[key] for key in group.keys]
            limits = ", ".join(f"{score.name} ({score.n})" for score in scores)
            lines += [f"## {check.capitalize()}", ""]
            lines += [
                f"Mean score over the base's, 1 is as good; {group.metric.resampled} in parentheses: {limits}.",
                "",
            ]
            lines += _markdown(tabulate_ratios(comparison, check, "**{}**"), escaped=(0,))
            lines += _markdown(_scores_table(comparison, group))
    lines += _own_sections(comparison)
    if comparison.duels:
        lines += [
            "## Ours against the best of the others",
            "",
            "Figure of ours over that of the best other method at the same target on the same text, or on the tasks "
            f"({_sides(comparison)}). Undecided: the interval holds 1. The best other is chosen by the figures it is "
            "then compared on, which favours it.",
            "",
            *_markdown(tabulate_duels(comparison.duels)),
        ]
    if bench.recipe.rounds:
        size = f"{results.base.facts['bytes'] / 1e6:.1f}"
        lines += ["## Sizes", "", f"Megabytes of the tensors, and their share of the base's {size}.", ""]
        lines += _markdown(tabulate_sizes(comparison))
        lines += _frontiers(comparison, frontier)
    lines += ["## Costs", "", *_costs(comparison)]
    if results.failed:
        lines += ["## What failed", ""]
        lines += [f"- {escape_markdown(f.cell.key)}: {escape_markdown(f.reason)}" for f in results.failed] + [""]
    lines += [
        "## Again",
        "",
        f"`{bench.command}` makes all of it. Every part of every cell is stored by content in the work folder: a run "
        "that was killed goes on where it was, and a method that is added to the recipe runs its own cells only. "
        "`--dry-run` lists what is stored and what is to do; cells that failed are tried again.",
    ]
    return "\n".join(lines) + "\n"


def update_rows(path: Path, comparison: Comparison) -> None:
    """Replace what stands between the two markers by the best method of each target.

    Best is the lowest geometric mean, over the texts, of the ratio of the headline metric.

    Raises:
        OutputError: if the file cannot be read or written, or has no markers.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise OutputError(f"{path} has no lines {BEGIN} and {END}; put them where the rows shall stand")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    table = "\n".join(_markdown(tabulate_best(comparison))).rstrip()
    write_text(path, f"{before}\n{table}\n{after}")


def _text_sections(comparison: Comparison) -> list[str]:
    lines: list[str] = []
    texts = {text.name: text for text in comparison.results.bench.recipe.texts}
    sections: dict[str, list[str]] = {}
    for check, group in comparison.list_groups("texts").items():
        metric, text = group.metric, texts[group.on]
        kind = "of the calibration's kind" if text.seen else "of a kind that calibration never saw"
        section = sections.setdefault(metric.name, [])
        section += [
            f"### {escape_markdown(text.name)}: {kind} (n = {comparison.draws[check].n} {metric.resampled})",
            "",
        ]
        section += _markdown(tabulate_ratios(comparison, check, "**{}**"), escaped=(0,))
    for name, section in sections.items():
        lines += [*_heading(METRICS[name]), *section]
    return lines


def _frontiers(comparison: Comparison, picture: str | None) -> list[str]:
    lines = [
        "## Quality against bytes and time",
        "",
        "By size. Bold: nothing that is no larger is better, by the point estimates. Decodes: times as fast as the "
        "base, by arithmetic over the bytes that are read for a token (16 bits a weight; rounded weights as they are "
        "stored where `serve_on` names an engine that has kernels for them), not measured.",
        "",
    ]
    if picture:
        lines += [f"![{HEADLINE.name.capitalize()} over the base's against megabytes and time]({picture})", ""]
    for check, group in comparison.list_groups("texts").items():
        if group.metric == HEADLINE:
            lines += [f"### {escape_markdown(group.on)}", ""]
            lines += _markdown(tabulate_frontier(comparison, check), escaped=(5,))
    return lines


def _own_sections(comparison: Comparison) -> list[str]:
    lines: list[str] = []
    for check, group in comparison.list_groups("own items").items():
        if not comparison.ratios[check]:
            continue
        metric, base = group.metric, comparison.results.base.scores[group.keys[0]]
        shown = format_value(base.value, base.stderr)
        lines += [*_heading(metric), f"The base: {shown} ({metric.unit}, n = {base.n} {metric.resampled}).", ""]
        lines += _markdown(tabulate_ratios(comparison, check, "**{}**"), escaped=(0,))
    return lines


def _heading(metric: Metric) -> list[str]:
    title, best = metric.name.capitalize(), "highest" if metric.higher_is_better else "lowest"
    told = f"{title} over the base's, with its 95 % interval; 1 is as good as the base. Bold: {best} of its column."
    return [f"## {title}", "", told, ""]


def _sides(comparison: Comparison) -> str:
    """Say on which side of 1 ours is better, by what was measured."""
    subjects: dict[str, str] = {}
    for group in comparison.groups.values():
        shown = f"mean score of {group.metric.pooled}" if group.metric.pooled else group.metric.name
        subjects[shown] = "above" if group.metric.higher_is_better else "below"
    return "; ".join(f"{name}: {side} 1 ours is better" for name, side in subjects.items())


def _texts_table(comparison: Comparison) -> Table:
    bench, base = comparison.results.bench, comparison.results.base
    metrics = list(dict.fromkeys(group.metric.name for group in comparison.list_groups("texts").values()))
    rows = []
    for text in bench.recipe.texts:
        scores = [base.scores[text.name, metric] for metric in metrics]
        where = f"{text.path.name}, {text.source}" if text.source else text.path.name
        tokens, digest = sum(item[1] for item in scores[0].items), bench.digests[f"text {text.name}"][:16]
        values = [format_value(score.value, score.stderr) for score in scores]
        seen = "seen" if text.seen else "unseen"
        rows.append([text.name, where, seen, str(scores[0].n), f"{tokens:,}", *values, digest, bench.notes[text.name]])
    headers = ["text", "file", "kind", "windows", "predicted tokens", *(f"base {m}" for m in metrics), "digest"]
    return [*headers, f"shares {SHARED_WORDS} successive words with"], rows


def _scores_table(comparison: Comparison, group: Group) -> Table:
    found = {("base", comparison.results.bench.base.layers): comparison.results.base}
    found |= comparison.measured_on(group)
    rows = []
    for (row, layers), measured in found.items():
        scores = [measured.scores[key] for key in group.keys]
        rows.append([row, str(layers), *(format_value(s.value, s.stderr) for s in scores)])
    return ["method", "layers", *(f"{name}, {metric}" for name, metric in group.keys)], rows


def _costs(comparison: Comparison) -> list[str]:
    targets, rounds = comparison.targets, comparison.results.bench.recipe.rounds
    rows, aligned, healed = [], [], []
    for row in comparison.rows:
        cells = [comparison.cells.get((row, target)) for target in targets]
        there = [cell for cell in cells if cell is not None]

        def spent(cell: Measured | None, *stages: str) -> str:
            seconds = [cell.seconds[stage] for stage in stages if stage in cell.seconds] if cell else []
            return f"{sum(seconds):.1f}" if seconds else "–"

        looked = [spent(cell, "observe", "score") for cell in there[:1]] or ["–"]
        stages = (("plan",), ("merge", "align"), *([("quantize",)] if rounds else []))
        rows.append([row, *looked, *(" / ".join(spent(c, *s) for c in cells) for s in stages)])
        for cell in there:
            facts = cell.facts.get("alignment") or {}
            if facts:
                assert cell.cell is not None
                spans = [facts[name] for name in ("tokens", "teacher_seconds", "seconds", "probe_seconds")]
                times = (facts["seconds"] + facts["probe_seconds"]) / facts["teacher_seconds"]
                aligned.append([row, str(cell.cell.layers), *(format_value(float(v)) for v in spans), f"{times:.2f}"])
            if facts := cell.facts.get("healing"):
                assert cell.cell is not None
                fall = [f"{facts[name]:.3f}" for name in ("start", "best")]
                healed.append([row, str(cell.cell.layers), f"{facts['tokens']:,}", *fall, f"{facts['seconds']:.0f}"])
    which, written = " / ".join(map(str, targets)), ["merge or align, write and check"]
    lines = [
        f"Seconds at {which} layers, as they were when each part was made. Hidden states and scores are made once for "
        "all targets, and a search for fewer layers goes on from one for more. Writing includes loading the result "
        "and a short generation to check it.",
        "",
        *_markdown((["method", "observe and score", "plan", *written, *(["round"] if rounds else [])], rows)),
    ]
    if aligned:
        headers = ["aligned", "layers", "tokens", "teacher's forward pass, s", "alignment, s", "choosing penalty, s"]
        lines += [
            "The teacher's forward pass is the base's share of the alignment, over the same tokens and without the "
            "language-model head.",
            "",
            *_markdown(([*headers, "both / teacher"], aligned)),
        ]
    if healed:
        headers = ["healed", "layers", "tokens", "divergence before", "after", "healing, s"]
        lines += [
            "Divergence is KL(base || model) in nats per token on the source that healing does not train on.",
            "",
            *_markdown((headers, healed)),
        ]
    return lines


def _markdown(table: Table, escaped: Sequence[int] | None = None) -> list[str]:
    """Lay out a table; cells are escaped, or only those of the columns named."""
    headers, rows = table
    body = [
        [escape_markdown(cell) if escaped is None or i in escaped else cell for i, cell in enumerate(row)]
        for row in rows
    ]
    sides = ["---"] * len(headers)
    return [f"| {' | '.join(cells)} |" for cells in (headers, sides, *body)] + [""]
