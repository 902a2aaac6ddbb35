"""The figures of a comparison as tables and as one JSON document."""

from collections.abc import Callable, Iterable, Mapping
from math import log
from typing import Any

import mka
from mka.bench.parts import Measured
from mka.bench.statistics import Comparison, Duel, Estimate
from mka.evaluation.metrics import HEADLINE
from mka.pipeline.quantize import describe_rounding
from mka.report.table import format_value

Table = tuple[list[str], list[list[str]]]


def format_ratio(value: float) -> str:
    """Format a ratio with as many figures as a reader needs: 1.083, 21.5, 12,345."""
    for limit, decimals in ((10, 3), (100, 1)):
        if value < limit:
            return f"{value:.{decimals}f}"
    return f"{value:,.0f}"


def format_estimate(estimate: Estimate) -> str:
    """Format a ratio with its interval."""
    return f"{format_ratio(estimate.value)} [{format_ratio(estimate.lower)}, {format_ratio(estimate.upper)}]"


def tabulate_ratios(comparison: Comparison, check: str, mark: str = "{} *") -> Table:
    """Lay out rows × targets of one group; the best of each column is marked, what failed or was not run says so."""
    group, values = comparison.groups[check], comparison.ratios[check]
    best = max if group.metric.higher_is_better else min
    targets = comparison.targets
    if group.metric.on != "texts":
        targets = [target for target in targets if any(at == target for _, at in values)]
    failed = {(item.cell.row, item.cell.layers) for item in comparison.results.failed}
    missing = {(cell.row, cell.layers) for cell in comparison.results.missing}
    tops = {t: best(found) for t in targets if (found := [v.value for (_, at), v in values.items() if at == t])}
    rows = []
    for row in comparison.rows:
        cells = []
        for target in targets:
            if estimate := values.get((row, target)):
                text = format_estimate(estimate)
                cells.append(mark.format(text) if estimate.value == tops[target] else text)
            else:
                cells.append("failed" if (row, target) in failed else "not run" if (row, target) in missing else "–")
        rows.append([row, *cells])
    layers = comparison.results.bench.base.layers
    return ["method", *(f"{target} of {layers} layers" for target in targets)], rows


def tabulate_duels(duels: Iterable[Duel]) -> Table:
    """Lay out ours against the best of the others."""
    rows = [[str(d.layers), d.on, d.ours, d.rival, format_estimate(d.ratio), d.verdict] for d in duels]
    return ["layers", "on", "ours", "best of the others", "ours / best other", "ours is"], rows


def tabulate_sizes(comparison: Comparison) -> Table:
    """Lay out the megabytes of every cell, and its share of the base's."""
    base, rows = comparison.results.base.facts["bytes"], []
    for row in comparison.rows:
        found = [comparison.cells.get((row, target)) for target in comparison.targets]
        rows.append(
            [row, *(f"{m.facts['bytes'] / 1e6:.1f} ({m.facts['bytes'] / base:.3f})" if m else "–" for m in found)]
        )
    layers = comparison.results.bench.base.layers
    return ["method", *(f"{target} of {layers} layers" for target in comparison.targets)], rows


def show_comparison(comparison: Comparison) -> str:
    """Lay out everything for a terminal."""
    from mka.terminal import align

    results = comparison.results
    parts = []

    def add(title: str, table: Table) -> None:
        headers, rows = table
        parts.append(f"{title}\n{align(rows, headers, 'l' + 'r' * (len(headers) - 1))}")

    for check, ratios in comparison.ratios.items():
        if ratios:
            add(_title(comparison, check), tabulate_ratios(comparison, check))
    if comparison.duels:
        add("ours against the best of the others", tabulate_duels(comparison.duels))
    parts += [f"{item.cell.key} failed: {item.reason}" for item in results.failed]
    if results.missing:
        parts.append(f"{len(results.missing)} cells not run yet; the same command runs them")
    parts.append("[ ] is the 95 % interval, paired bootstrap. * is the best of its column.")
    return "\n\n".join(parts)


def _title(comparison: Comparison, check: str) -> str:
    group, draws = comparison.groups[check], comparison.draws[check]
    count = f"(n = {draws.n} {group.metric.resampled})"
    if group.metric.pooled:
        return f"{check}: mean score / base's {count}"
    base = comparison.results.base.scores[group.keys[0]]
    return f"{group.on}: {group.metric.name} / base's {format_value(base.value, base.stderr)} {count}"


def to_document(comparison: Comparison) -> dict[str, Any]:
    """Return all figures as JSON types."""
    results = comparison.results
    cells = []
    for at, measured in comparison.cells.items():
        assert measured.cell is not None
        entry = measured.cell.entry
        cells.append(
            {
                "row": at[0],
                "method": entry.name,
                "settings": entry.settings,
                "ours": entry.ours,
                "layers": at[1],
                "aligned": measured.cell.aligned,
                "healed": measured.cell.healed,
                "rounded": describe_rounding(measured.cell.rounded) if measured.cell.is_rounded else None,
                "scores": _scores(measured),
                "ratios": {check: vars(found[at]) for check, found in comparison.ratios.items() if at in found},
                "seconds": dict(measured.seconds),
                "checkpoint": dict(measured.facts),
            }
        )
    return {
        "name": results.bench.recipe.name,
        "command": results.bench.command,
        "conditions": dict(describe_conditions(comparison)),
        "base": {
            "scores": _scores(results.base),
            "seconds": dict(results.base.seconds),
        },
        "cells": cells,
        "duels": [{**vars(duel), "ratio": vars(duel.ratio)} for duel in comparison.duels],
        "failed": [
            {"row": f.cell.row, "layers": f.cell.layers, "reason": f.reason, "expected": f.expected}
            for f in results.failed
        ],
        "missing": [{"row": cell.row, "layers": cell.layers} for cell in results.missing],
    }


def describe_conditions(comparison: Comparison) -> list[tuple[str, str]]:
    """Say what was compared, on what and with what; where measurements differ in it, all values."""
    bench = comparison.results.bench
    recipe, settings = bench.recipe, bench.recipe.evaluation
    everything = [c for m in (comparison.results.base, *comparison.results.measured) for c in m.conditions]

    def all_of(show: Callable[[Mapping[str, Any]], Any]) -> str:
        return "; ".join(dict.fromkeys(str(show(condition)) for condition in everything))

    rows = [
        ("model", f"{recipe.model.label}, {bench.base.layers} layers, digest {bench.base.digest[:16]}"),
        ("revision", bench.revision),
        ("never touched", f"the first {recipe.protect_first} and last {recipe.protect_last} layers"),
        ("windows", f"{settings.context} tokens, at most {settings.text_tokens:,} predicted tokens per text"),
        ("intervals", f"95 %, {recipe.resamples:,} paired resamples of windows (of items in each task)"),
        ("seed", str(recipe.seed)),
    ]
    inputs = bench.inputs
    if inputs.calibration:
        c = recipe.calibration
        what = f"{len(inputs.calibration.texts)} texts of at most {c.max_tokens} tokens, digest "
        what += f"{inputs.calibration.digest[:16]}; searches on {c.search_tokens} tokens"
        rows.append(("calibration", what))
    if inputs.alignment:
        what = f"at most {recipe.alignment.tokens:,} tokens of {len(inputs.alignment.texts)} sources, "
        rows.append(("alignment", what + f"digest {inputs.alignment.digest[:16]}"))
    if inputs.healing:
        h = recipe.heal
        what = f"{h.train}, windows of {h.context}, {h.batch} per step, {len(inputs.healing.texts)} sources of which "
        rows.append(("healing", what + f"one only measures, digest {inputs.healing.digest[:16]}"))
    rows += [
        ("precision", recipe.model.dtype),
        ("device", all_of(lambda c: c["device"])),
        ("threads", all_of(lambda c: f"{c['threads']} of {c['cpus']} CPU cores")),
        ("platform", all_of(lambda c: c["platform"])),
        (
            "versions",
            all_of(lambda c: ", ".join(f"{n} {v}" for n, v in {"mka": mka.__version__, **c["versions"]}.items())),
        ),
    ]
    return rows


def tabulate_best(comparison: Comparison) -> Table:
    """Lay out the best row of each target by the headline, with its ratio on every text."""
    ratios = {
        group.on: comparison.ratios[check] for check, group in comparison.groups.items() if group.metric == HEADLINE
    }
    rows = []
    for target in comparison.targets:
        means = {
            row: sum(log(values[row, target].value) for values in ratios.values())
            for row, layers in comparison.cells
            if layers == target
        }
        if means:
            best = (max if HEADLINE.higher_is_better else min)(means, key=means.__getitem__)
            found = [format_estimate(values[best, target]) for values in ratios.values()]
            rows.append([f"{target} of {comparison.results.bench.base.layers}", best, *found])
    kinds = {text.name: "seen" if text.seen else "unseen" for text in comparison.results.bench.recipe.texts}
    return ["layers", "best method", *(f"{name} ({kinds[name]} kind)" for name in ratios)], rows


def _scores(measured: Measured) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "metric": s.metric, "value": s.value, "stderr": s.stderr, "n": s.n}
        for s in measured.scores.values()
    ]
