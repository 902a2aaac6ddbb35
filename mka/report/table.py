"""Base, control and candidate side by side: the one table that terminal, artifact, page and card show."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from mka.evaluation.metrics import FACTS, find_metric, group_scores, read_fact
from mka.evaluation.scores import EvalReport, Score
from mka.report.control import has_own_control
from mka.report.sizes import SERVED, show_bytes
from mka.report.speeds import OVERLAP, SPEEDS, overlap, show_speed


def format_value(value: float, stderr: float | None = None) -> str:
    """Format a figure with as many decimals as two digits of its standard error, or four significant digits."""
    if not math.isfinite(value):
        return str(value)
    if stderr is not None and math.isfinite(stderr) and stderr > 0:
        decimals = min(6, max(0, 1 - math.floor(math.log10(stderr))))
        return f"{value:,.{decimals}f} ± {stderr:,.{decimals}f}"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def result_table(
    base: EvalReport | None, candidate: EvalReport | None, control: EvalReport | None = None
) -> list[dict[str, str]]:
    """Format base, control and candidate side by side, the one table that terminal, artifact, page and card show.

    Returns:
        rows with keys ``quantity``, ``base``, ``control`` if there is one that is not the base, ``candidate`` and
        ``ratio`` (candidate / base; words where the ranges of two speeds overlap). ``±`` is one standard error; n is in
        ``quantity``, as ``n = base / candidate`` where they differ. A missing figure is an en dash.
    """
    sides = {"base": base} | ({"control": control} if has_own_control(base, control) else {}) | {"candidate": candidate}
    reports = list(sides.values())
    rows: list[dict[str, str]] = []

    def add(quantity: str, values: list[Any], show: Callable[[Any], str], texts: list[str] | None = None) -> None:
        """Add a row unless no side has the figure."""
        before, after = values[0], values[-1]
        if all(value is None for value in values):
            return
        shown = texts or ["–" if value is None else show(value) for value in values]
        ratio = "–" if not before or after is None else f"{after / before:.3f}"
        rows.append({"quantity": quantity, **dict(zip(sides, shown, strict=True)), "ratio": ratio})

    def add_scores(quantity: str, scores: list[Score | None], unit: str) -> None:
        """Add a row of measured scores with error and n."""
        counts = " / ".join(dict.fromkeys(f"{score.n:,}" for score in scores if score))
        texts = ["–" if score is None else format_value(score.value, score.stderr) for score in scores]
        add(f"{quantity} (n = {counts} {unit})", [score and score.value for score in scores], str, texts)

    facts = [report.checkpoint if report else {} for report in reports]
    layers, parameters, size = ([fact.get(key) for fact in facts] for key in ("layers", "parameters", "bytes"))
    add("layers", layers, FACTS["layers"].show)
    add("parameters", parameters, FACTS["parameters"].show)
    add("size", size, show_bytes)
    served = [fact.get(SERVED) for fact in facts]
    if served != size and all(served):
        # What is stored in 32 bits is measured in 32 bits, and served in 16.
        add("size as served, 16 bits", served, show_bytes)
        size = served
    add("bits per parameter", [b and p and 8 * b / p for b, p in zip(size, parameters)], "{:.1f}".format)
    tables = [{(s.name, s.metric): s for s in (report.scores if report else ())} for report in reports]
    for group in group_scores({key: score for table in tables for key, score in table.items()}.values()):
        measured = {key: [table.get(key) for table in tables] for key in group.keys}
        for (name, kind), scores in measured.items():
            row = find_metric(kind)
            add_scores(row.label.format(metric=kind, name=name), scores, row.resampled)
            for extra in row.extras:
                figures = [score and score.extra.get(extra.key) for score in scores]
                add(extra.label.format(name=name), figures, extra.form.format)
        # A mean over different sets of tasks would compare nothing.
        shared = [[score for score in scores if score] for scores in measured.values() if None not in scores]
        if (pool := group.metric.pooled) and len(shared) > 1:
            means = [mean_score(side) for side in zip(*shared)]
            add_scores(f"mean of {len(shared)} {pool}", [*means], group.metric.resampled)
    for name in SPEEDS.values():
        values = [read_fact(report, name) if report else None for report in reports]
        shown = [(show_speed(report, name) if report else None) or "–" for report in reports]
        add(f"{name.partition('_')[0]} speed", values, str, shown)
        if base and candidate and None not in values and overlap(base, candidate, name):
            rows[-1]["ratio"] = OVERLAP
    return rows


def mean_score(scores: Sequence[Score]) -> Score:
    """Unweighted mean of task scores; tasks are independent, so the variances of their errors add."""
    stderr = math.sqrt(sum(score.stderr**2 for score in scores)) / len(scores)
    value = sum(score.value for score in scores) / len(scores)
    return Score("mean", "mean", value, stderr, sum(score.n for score in scores), True)
