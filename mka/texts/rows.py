"""Tables of texts: read, checked, digested, laid out."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mka.errors import CalibrationError
from mka.outside.printable import one_line
from mka.outside.project import suggest_table
from mka.outside.reading import UnreadableError, parse_json, quote, read_within

EXCERPT_CHARACTERS = 60
# Of one text. Tokenizing takes some 200 bytes for each, all at once.
LONGEST_TEXT = 2_000_000
# Of a source's name, which stands in tables and names metrics.
LONGEST_SOURCE = 200
# Bytes of a table, which is held in memory.
LARGEST_TABLE = 1_000_000_000
# What other files begin with that are taken for tables.
_FOREIGN = {b"\x1f\x8b": "gzip", b"PK": "a zip archive", b"PAR1": "Parquet", b"\x28\xb5\x2f\xfd": "Zstandard"}
_FOREIGN |= {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"SQLite": "SQLite", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def normalize_text(text: str) -> str:
    """Casefold a text and collapse its whitespace: what makes two texts the same text."""
    return " ".join(text.casefold().split())


def text_digest(text: str) -> str:
    """Return the SHA-256 of the normalized text as 64 hex digits."""
    return hashlib.sha256(normalize_text(text).encode()).hexdigest()


def digest_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of a sequence of texts, as they are and in their order."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def digest_sources(texts: Mapping[str, Iterable[str]]) -> str:
    """Return the SHA-256 over sources and their texts, in their order."""
    return digest_texts(f"{source}\0{text}" for source in texts for text in texts[source])


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
        for number, row in enumerate(rows, start=1):
            _check_length(row["text"], f"{name}, paragraph {number}")
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


def read_heldout(path: Path) -> dict[str, list[str]]:
    """Read held-out texts and group them by source, in the table's order.

    Raises:
        CalibrationError: as `read_rows`.
    """
    grouped: dict[str, list[str]] = {}
    for row in read_rows(path):
        grouped.setdefault(row["source"], []).append(row["text"])
    return grouped


def format_rows(rows: Iterable[dict[str, Any]]) -> str:
    r"""Lay rows out as JSON lines of which equal rows give equal bytes: sorted keys, ``\n``."""
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)


def _decode(data: bytes | Path, name: str) -> str:
    if isinstance(data, Path):
        try:
            data = read_within(data, LARGEST_TABLE)
        except FileNotFoundError:
            raise CalibrationError(f"text table not found: {name}; {suggest_table()}") from None
        except OSError as error:
            raise CalibrationError(f"{name} cannot be read: {error.strerror}") from None
        except UnreadableError as error:
            raise CalibrationError(f"{name} cannot be read: {error}") from None
    if foreign := next((kind for mark, kind in _FOREIGN.items() if data.startswith(mark)), None):
        raise CalibrationError(f"{name} is {foreign}; give JSON lines with a `text` field, or a .txt file, in UTF-8")
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except UnreadableError as error:
        raise CalibrationError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        keys = one_line(", ".join(row) if isinstance(row, dict) else type(row).__name__, 120)
        raise CalibrationError(f"{where}: needs a `text` field that is a string, got {keys or 'no fields'}")
    if not row["text"].strip():
        raise CalibrationError(f"{where}: the text is empty")
    if not isinstance(row.get("source", ""), str):
        raise CalibrationError(f"{where}: `source` must be a string, got {quote(row['source'])}")
    if not row.get("source", "").isprintable() or len(row.get("source", "")) > LONGEST_SOURCE:
        given = quote(row["source"])
        raise CalibrationError(
            f"{where}: `source` must be a name on one line, at most {LONGEST_SOURCE} long, got {given}"
        )
    _check_length(row["text"], where)
    return row


def _check_length(text: str, where: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise CalibrationError(
            f"{where}: the text has {len(text):,} characters; at most {LONGEST_TEXT:,} are read at once, divide it"
        )
