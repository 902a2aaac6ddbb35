"""Seeded choices by sorting hashes: they depend on the seed and the items alone.

Not on a random generator's version, nor on how many items another table takes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

from mka.errors import CalibrationError
from mka.texts.overlap import word_runs
from mka.texts.rows import text_digest

Row = dict[str, Any]

# Of ten BoolQ passages two are for evaluation, two are held out and six are for calibration, whatever the counts.
ROOMS = ("evaluation",) * 2 + ("heldout",) * 2 + ("calibration",) * 6


def shuffle_rows(rows: Iterable[Row], seed: int) -> list[Row]:
    """Order rows by the hash of seed and content: a shuffle whose first n rows are a seeded sample for every n."""

    def key(row: Row) -> str:
        content = json.dumps(row, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()

    return sorted(rows, key=key)


def take_rows(rows: list[Row], count: int, seed: int, key: str) -> list[Row]:
    """Take the first ``count`` rows of the shuffle.

    Raises:
        CalibrationError: if there are fewer; ``key`` is what data/params.yaml calls the count.
    """
    if len(rows) < count:
        raise CalibrationError(f"data/params.yaml: {key} asks for {count} texts, there are {len(rows)}; lower it")
    return shuffle_rows(rows, seed)[:count]


def assign_room(text: str, seed: int) -> str:
    """Return which table a text may appear in: ``evaluation``, ``heldout`` or ``calibration``."""
    draw = hashlib.sha256(f"room:{seed}:{text_digest(text)}".encode()).hexdigest()
    return ROOMS[int(draw, 16) % len(ROOMS)]


def keep_apart(texts: Iterable[str]) -> Callable[[str], bool]:
    """Return a test that a text passes if it equals none of ``texts`` and shares no 13 successive words with one."""
    texts = list(texts)
    digests = {text_digest(text) for text in texts}
    runs = set().union(*map(word_runs, texts))

    def is_free(text: str) -> bool:
        return text_digest(text) not in digests and runs.isdisjoint(word_runs(text))

    return is_free


def collect_rows(source: str, origin: str, texts: Iterable[str], min_chars: int) -> list[Row]:
    """Make rows of the distinct texts of at least ``min_chars`` characters; ``origin`` begins their ids."""
    rows: dict[str, Row] = {}
    for index, text in enumerate(texts):
        text, digest = text.strip(), text_digest(text)
        if len(text) >= min_chars:
            rows.setdefault(digest, {"id": f"{origin}/{index}", "source": source, "text": text, "text_sha256": digest})
    return list(rows.values())
