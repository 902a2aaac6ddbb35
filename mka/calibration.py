"""The calibration set: read, checked, digested, and kept apart from what evaluation uses."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.errors import CalibrationError

# k-nearest-neighbour mutual information is bounded by psi(n) - psi(k) and biased below some 200 samples;
# below 50 it says nothing about layers.
MINIMUM_TEXTS = 50
# Shorter evaluation texts ("Which of the following is true?") also occur in innocent calibration texts.
CONTAINED_CHARACTERS = 64
EXCERPT_CHARACTERS = 60
# Length of a shared run of words that makes two texts near-copies (the usual choice since GPT-3).
SHARED_WORDS = 13


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


def normalize_text(text: str) -> str:
    """Casefold a text and collapse its whitespace: what makes two texts the same text."""
    return " ".join(text.casefold().split())


def text_digest(text: str) -> str:
    """Return the SHA-256 of the normalized text as 64 hex digits."""
    return hashlib.sha256(normalize_text(text).encode()).hexdigest()


def digest_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of a sequence of texts, as they are and in their order."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def read_rows(data: bytes | Path, name: str | None = None) -> list[dict[str, Any]]:
    """Read a table of texts: JSON lines with a ``text`` field, or plain text whose paragraphs are the texts.

    Args:
        data: the file, or its bytes. Names that end in ``.txt`` are plain text.
        name: how messages call it; needed for bytes of plain text.

    Returns:
        One row per text, each with at least ``text`` and ``source`` (the file's stem where the table has none).

    Raises:
        CalibrationError: if the file is missing, empty or not UTF-8, or a line is no object with a text.
    """
    name = name or (str(data) if isinstance(data, Path) else "calibration set")
    decoded = _decode(data, name)
    stem = Path(name).stem
    if name.endswith(".txt"):
        paragraphs = "\n".join(line.strip() for line in decoded.split("\n")).split("\n\n")
        rows = [{"text": text.strip(), "source": stem} for text in paragraphs if text.strip()]
    else:
        # Not splitlines(): U+2028 and U+0085 are legal inside a JSON string.
        lines = enumerate(decoded.split("\n"), start=1)
        rows = [{"source": stem} | _parse_line(line, f"{name}, line {i}") for i, line in lines if line.strip()]
    if not rows:
        raise CalibrationError(f"{name} is empty; give JSON lines with a `text` field, or a .txt file")
    return rows


def read_texts(data: bytes | Path, name: str | None = None) -> list[str]:
    """Read the texts of a table; arguments and refusals are those of `read_rows`."""
    return [row["text"] for row in read_rows(data, name)]


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


def word_runs(text: str, length: int = SHARED_WORDS) -> set[tuple[str, ...]]:
    """Return all runs of ``length`` successive words of a text, casefolded."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def find_overlap(texts: Iterable[str], evaluation_texts: Iterable[str]) -> list[str]:
    """Return the texts that equal an evaluation text or contain one of at least `CONTAINED_CHARACTERS` characters.

    Case and whitespace make no difference. Containment catches a benchmark question followed by its options.
    """
    texts = list(texts)
    normalized = [normalize_text(text) for text in texts]
    wanted = {normalize_text(text) for text in evaluation_texts} - {""}
    # One search per evaluation text, over all calibration texts at once; NUL cannot match across their borders.
    joined = "\0".join(normalized)
    contained = [text for text in wanted if len(text) >= CONTAINED_CHARACTERS and text in joined]
    return [
        text
        for text, plain in zip(texts, normalized, strict=True)
        if plain in wanted or any(part in plain for part in contained)
    ]


def refuse_overlap(texts: Iterable[str], evaluation_texts: Iterable[str]) -> None:
    """Refuse calibration texts that evaluation uses.

    Raises:
        CalibrationError: with the number of offending texts and the beginnings of up to five of them.
    """
    texts = list(texts)
    offending = find_overlap(texts, evaluation_texts)
    if offending:
        excerpts = "; ".join(repr(" ".join(text.split())[:EXCERPT_CHARACTERS]) for text in offending[:5])
        raise CalibrationError(
            f"{len(offending)} of {len(texts)} calibration texts are used by evaluation: {excerpts}; remove them"
        )


def read_heldout(path: Path) -> dict[str, list[str]]:
    """Read held-out texts and group them by source, in the table's order.

    Raises:
        CalibrationError: as `read_rows`.
    """
    grouped: dict[str, list[str]] = {}
    for row in read_rows(path):
        grouped.setdefault(row["source"], []).append(row["text"])
    return grouped


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    r"""Write JSON lines of which equal rows give equal bytes: sorted keys, UTF-8, ``\n``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    aside.write_text("".join(lines), encoding="utf-8", newline="\n")
    aside.replace(path)


def _decode(data: bytes | Path, name: str) -> str:
    if isinstance(data, Path):
        try:
            data = data.read_bytes()
        except FileNotFoundError:
            raise CalibrationError(f"text table not found: {name}; `make data` builds the project's own") from None
        except OSError as error:
            raise CalibrationError(f"{name} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CalibrationError(f"{where}: needs a `text` field that is a string, got {keys or 'no fields'}")
    if not row["text"].strip():
        raise CalibrationError(f"{where}: the text is empty")
    if not isinstance(row.get("source", ""), str):
        raise CalibrationError(f"{where}: `source` must be a string, got {row['source']!r}")
    try:
        row["text"].encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{where}: the text holds a lone surrogate at character {error.start}") from None
    return row
