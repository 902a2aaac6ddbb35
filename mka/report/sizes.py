"""What models weigh, counted alike: as they are served, where that is known of all of them, beside what is stored."""

from mka.evaluation.metrics import FACTS
from mka.evaluation.scores import EvalReport

STORED, SERVED = "bytes", "served_bytes"


def find_kind(*reports: EvalReport | None) -> str:
    """Return the fact by which models are compared: bytes as served, or as stored if one does not say the former."""
    known = [report.checkpoint for report in reports if report is not None]
    return SERVED if known and all(facts.get(SERVED) for facts in known) else STORED


def read_bytes(report: EvalReport | None, kind: str) -> float | None:
    """Read one of the two; None if the report does not tell it."""
    value = report.checkpoint.get(kind) if report else None
    return float(value) if value else None


def show_bytes(value: float) -> str:
    """Write a number of bytes with its unit."""
    return FACTS["bytes"].show(value)
