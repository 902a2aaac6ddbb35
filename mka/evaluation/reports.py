"""Reports of evaluations that people hand in: read and held against what a model can have."""

from pathlib import Path
from typing import Any

from mka.errors import ReportError
from mka.evaluation.metrics import METRICS
from mka.evaluation.scores import EvalReport
from mka.outside.reading import LARGEST, UnreadableError, give_reason, is_number, quote


def read_report(path: Path) -> EvalReport:
    """Read an evaluation report that was handed in.

    Raises:
        ReportError: if the file is none.
    """
    try:
        report = EvalReport.load(path)
        _check(report)
        return report
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ReportError(f"{path} is not a report of mka evaluate ({give_reason(error)})") from None


def _check(report: EvalReport) -> None:
    """Refuse facts and scores that no model has.

    Raises:
        ValueError: naming the first.
    """
    counted = ("layers", "parameters", "bytes", "served_bytes")
    facts = {name: report.checkpoint[name] for name in counted if name in report.checkpoint}
    for name, value in {**facts, **report.speed}.items():
        if not is_number(value) or not 0 < value < LARGEST:
            raise UnreadableError(f"{name} must be a number above 0, got {quote(value)}")
    for score in report.scores:
        row = METRICS.get(score.metric)
        if row is None:
            raise UnreadableError(f"{quote(score.name)}: unknown metric {quote(score.metric)}")
        what = f"{row.name} of {quote(score.name)}"
        if not 2 <= score.n < LARGEST or score.stderr < 0:
            raise UnreadableError(f"{what}: n is {score.n} and its error {score.stderr}; n must be at least 2")
        good = _is_window if row.resampled == "windows" else is_number
        if strange := [item for item in score.items if not good(item)]:
            raise UnreadableError(f"{what}: an item of its {row.resampled} is {quote(strange[0])}")
        extras = {extra.key: score.extra.get(extra.key) for extra in row.extras}
        if strange := [key for key, value in extras.items() if value is not None and not is_number(value)]:
            raise UnreadableError(f"{what}: {strange[0]} is {quote(extras[strange[0]])}, not a number")


def _is_window(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and all(map(is_number, item)) and item[1] > 0
