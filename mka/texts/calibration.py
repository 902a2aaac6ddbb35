"""The calibration set: read, checked, digested, and kept apart from what evaluation uses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.errors import CalibrationError
from mka.texts.rows import digest_texts, read_rows, text_digest

# k-nearest-neighbour mutual information is bounded by psi(n) - psi(k) and biased below some 200 samples;
# below 50 it says nothing about layers.
MINIMUM_TEXTS = 50


@dataclass(frozen=True)
class CalibrationSet:
    """The texts a method may look at.

    Attributes:
        texts: S texts, distinct, in the table's order.
        sources: where each of them comes from, S names.
        digest: SHA-256 of the texts; equal digests mean equal texts in equal order.
        path: the table they were read from.
        rev: the Git revision it was read at; None for the working copy.
    """

    texts: tuple[str, ...]
    sources: tuple[str, ...]
    digest: str
    path: str
    rev: str | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise CalibrationError(f"calibration set {self.path} has no texts; give a table with a `text` field")
        if len(self.texts) != len(self.sources):
            raise CalibrationError(f"{self.path}: {len(self.texts)} texts but {len(self.sources)} sources")


def load_calibration(
    data: bytes | Path,
    samples: int,
    minimum: int = MINIMUM_TEXTS,
    path: str | None = None,
    rev: str | None = None,
) -> CalibrationSet:
    """Take the first ``samples`` distinct texts of a table.

    Repeated texts are passed over: two equal points are at distance 0, which nearest-neighbour estimates cannot use.

    Args:
        data: the table, as for `read_rows`.
        samples: number of texts S.
        minimum: fewest texts accepted.
        path: what the set is called; default: the file's path.
        rev: Git revision the bytes were read at.

    Raises:
        CalibrationError: if the table cannot be read, or ``samples`` or its distinct texts are too few.
    """
    path = path or (str(data) if isinstance(data, Path) else "calibration set")
    if samples < minimum:
        raise CalibrationError(
            f"calibration.samples is {samples}; nearest-neighbour estimates need at least {minimum} texts, better 200"
        )
    distinct: dict[str, dict[str, Any]] = {}
    for row in read_rows(data, path):
        distinct.setdefault(text_digest(row["text"]), row)
    rows = list(distinct.values())
    if len(rows) < samples:
        raise CalibrationError(
            f"{path} has {len(rows)} distinct texts, calibration.samples asks for {samples}; "
            + (f"lower it to {len(rows)} or " if len(rows) >= minimum else f"at least {minimum} are needed, ")
            + "add texts"
        )
    texts = tuple(row["text"] for row in rows[:samples])
    return CalibrationSet(texts, tuple(row["source"] for row in rows[:samples]), digest_texts(texts), path, rev)
