"""Two models side by side: what they are, what differs in their configs, which measured better on the same items."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mka.bench.statistics import Draws, draw_scores, judge_ratio
from mka.errors import MkaError, ReportError
from mka.evaluation.bootstrap import find_mismatch
from mka.evaluation.metrics import find_metric, group_scores
from mka.evaluation.reports import read_report
from mka.evaluation.scores import EvalReport, Score
from mka.model.checkpoint import Checkpoint, describe_headers
from mka.outside.printable import one_line
from mka.pipeline.compress import EVIDENCE
from mka.pipeline.inspect import open_headers
from mka.report.table import mean_score
from mka.sources.fetch import parse_model
from mka.store.sums import SUMS_NAME

# Resamples of every interval, as the gate draws them.
RESAMPLES = 2000
# Of a config, what says nothing about the model.
_SILENT = ("_name_or_path", "transformers_version")
# Conditions without which figures are of something else, though the items are the same.
_ALIKE = ("dtype", "shots", "max_length")
_LONGEST = 60


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: as it was typed.
        facts: model_type, layers, parameters, bytes, dtype, as far as they are known.
        config: its config.json; None of a report.
        report: what was measured of it; None if no report of it is here.
        source: the file of the report.
    """

    name: str
    facts: Mapping[str, Any]
    config: Mapping[str, Any] | None = None
    report: EvalReport | None = None
    source: Path | None = None


def open_sides(names: Sequence[str], given: Sequence[Path], work: Path) -> list[Side]:
    """Open two models or reports, and find the reports of models.

    A model's report is the one that names its digest, among those given, in its own evidence, and in the other's, where
    that of a base is.

    Args:
        names: folders, hub ids or packages as other commands take them, or files that `mka evaluate` wrote.
        given: further reports.
        work: where models are fetched to.

    Raises:
        CheckpointError: if a model cannot be had.
        ReportError: if a file is no report, or a report that was given is of neither model.
    """
    reports = {path: read_report(path) for path in given}
    models: dict[str, Checkpoint] = {}
    for name in dict.fromkeys(names):
        if not Path(name).is_file():
            models[name] = open_headers(parse_model(name), work)
    beside = [path for model in models.values() for path in _list_evidence(model.path)]
    found = reports | {path: read_report(path) for path in beside}
    digests = {name: digest_stored(model) for name, model in models.items()} if found else {}
    for path, report in reports.items():
        if report.checkpoint.get("digest") not in digests.values():
            raise ReportError(
                f"report {path} is of {report.checkpoint.get('path', 'a model it does not name')}, which is neither "
                "of the two; name a report of one of them"
            )
    sides = []
    for name in names:
        if name not in models:
            report = read_report(Path(name))
            sides.append(Side(name, report.checkpoint, None, report, Path(name)))
            continue
        own = [(path, report) for path, report in found.items() if report.checkpoint.get("digest") == digests[name]]
        source, measured = own[0] if own else (None, None)
        sides.append(Side(name, describe_headers(models[name]), models[name].config, measured, source))
    return sides


def _list_evidence(folder: Path) -> list[Path]:
    return [path for role in ("candidate", "control", "base") if (path := folder / EVIDENCE / f"{role}.json").is_file()]


def digest_stored(checkpoint: Checkpoint) -> str:
    """Return a checkpoint's digest by the sums beside it, if it has any: files are read only where it has none."""
    return replace(checkpoint, verified=(checkpoint.path / SUMS_NAME).is_file()).digest


def list_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the keys of two configs whose values differ, with both values; None where a key is not there."""
    keys = [key for key in {**first, **second} if key not in _SILENT]
    return [
        {"key": key, "a": first.get(key), "b": second.get(key)} for key in keys if first.get(key) != second.get(key)
    ]


def show_setting(value: Any) -> str:
    """Write a value of a config on one line."""
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} values"
    return "–" if value is None else one_line(json.dumps(value, ensure_ascii=False), _LONGEST)


def compare_scores(first: EvalReport, second: EvalReport, *, seed: int = 0) -> list[dict[str, Any]]:
    """Hold what was measured of two models against each other, score by score, and pools by their mean.

    Args:
        first: A.
        second: B.
        seed: of the resampling.

    Returns:
        name, metric, label, n, a and b (the scores), ratio (B over A) with its two-sided 95 % interval ``lower`` and
        ``upper`` (None where the data give none), ``verdict`` of B ("better", "worse", "equal", "undecided"), or None
        with the reason in ``why`` where the two were not measured alike; ``counts`` of what the verdict on a group is.
    """
    tables = [{(score.name, score.metric): score for score in report.scores} for report in (first, second)]
    shared = [score for key, score in tables[0].items() if key in tables[1]]
    unlike = _find_unlike(first, second)
    rows = []
    for group in group_scores(shared):
        pairs = [(tables[0][key], tables[1][key]) for key in group.keys]
        whole = [pair for pair in pairs if find_mismatch(*pair) is None and not unlike]
        for pair in pairs:
            label = find_metric(pair[1].metric).label.format(metric=pair[1].metric, name=pair[1].name)
            why = unlike or find_mismatch(*pair)
            rows.append(_compare([pair], label, seed, why) | {"counts": len(pairs) == 1})
        if len(pairs) > 1 and whole:
            label = f"mean of {len(whole)} {group.metric.pooled}"
            rows.append(_compare(whole, label, seed, None) | {"counts": True})
    return rows


def _find_unlike(first: EvalReport, second: EvalReport) -> str | None:
    sides = (first.conditions, second.conditions)
    told = [
        f"{key} {values[0]} and {values[1]}"
        for key in _ALIKE
        if len(set(values := [str(side.get(key)) for side in sides])) > 1
    ]
    return f"conditions: {', '.join(told)}" if told else None


def _compare(pairs: Sequence[tuple[Score, Score]], label: str, seed: int, why: str | None) -> dict[str, Any]:
    a, b = pairs[0] if len(pairs) == 1 else map(mean_score, zip(*pairs))
    row: dict[str, Any] = {"name": b.name, "metric": b.metric, "label": label, "n": b.n, "a": a, "b": b}
    row |= dict.fromkeys(("ratio", "lower", "upper", "verdict", "why"))
    if why is not None:
        return row | {"why": f"they differ in {why}"}
    try:
        draws: Draws = draw_scores(dict(zip("ab", zip(*pairs))), seed=seed, resamples=RESAMPLES)
        ratio = draws.ratio("b", "a")
    except MkaError as error:
        return row | {"why": str(error)}
    numbers = {"ratio": ratio.value, "lower": ratio.lower, "upper": ratio.upper}
    verdict = judge_ratio(ratio, below=not draws.metric.higher_is_better)
    return row | {key: value if math.isfinite(value) else None for key, value in numbers.items()} | {"verdict": verdict}


def summarise(sides: Sequence[Side], rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in plain sentences which of the two is smaller, and which measured better in what, if that can be told."""
    told = []
    layers, sizes = ([side.facts.get(key) for side in sides] for key in ("layers", "bytes"))
    if sizes[0] and sizes[1]:
        share = sizes[1] / sizes[0]
        fewer = f"has {layers[1]} layers, A {layers[0]}; it " if all(layers) and layers[0] != layers[1] else ""
        told.append(f"B {fewer}takes {share:.3f} times A's bytes.")
    decided = [row for row in rows if row["counts"]]
    named = {verdict: [r for r in decided if r["verdict"] == verdict] for verdict in ("better", "worse", "undecided")}
    for verdict, who in (("better", "B"), ("worse", "A")):
        if named[verdict]:
            told.append(f"{who} is better in {_list(_show_ratio(row) for row in named[verdict])}.")
    if named["undecided"]:
        told.append(f"Which is better in {_list(_show_ratio(r) for r in named['undecided'])} cannot be told.")
    if alike := [row["label"] for row in decided if row["verdict"] == "equal"]:
        told.append(f"They are equal in {_list(alike)}.")
    missing = [letter for letter, side in zip("AB", sides) if side.report is None]
    if missing:
        told.append(f"Which is better cannot be told: no report of {' and '.join(missing)} is here.")
    elif not rows:
        told.append("Which is better cannot be told: the two reports share no measurement.")
    for why in dict.fromkeys(row["why"] for row in decided if row["why"]):
        told.append(f"{_list(r['label'] for r in decided if r['why'] == why)} cannot be compared: {why}.")
    return " ".join(told)


def _show_ratio(row: Mapping[str, Any]) -> str:
    upper = "open" if row["upper"] is None else f"{row['upper']:.3f}"
    value, lower = ("–" if row[key] is None else f"{row[key]:.3f}" for key in ("ratio", "lower"))
    return f"{row['label']} (B / A {value} [{lower}, {upper}])"


def _list(items: Any) -> str:
    *first, last = list(items)
    return f"{', '.join(first)} and {last}" if first else str(last)
