"""Texts kept apart: what calibration may not share with evaluation."""

import re
from collections.abc import Iterable
from pathlib import Path

from mka.errors import CalibrationError
from mka.texts.rows import EXCERPT_CHARACTERS, normalize_text, read_heldout

# Shorter evaluation texts ("Which of the following is true?") also occur in innocent calibration texts.
CONTAINED_CHARACTERS = 64
# Length of a shared run of words that makes two texts near-copies (the usual choice since GPT-3).
SHARED_WORDS = 13


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


def read_apart(path: Path, measured: Iterable[str], name: str) -> dict[str, list[str]]:
    """Read a table that is trained or fitted on, source -> texts, and refuse what evaluation uses.

    Args:
        path: JSON lines with ``text`` and ``source``.
        measured: every text that evaluation uses.
        name: what refusals call the table, e.g. "alignment".

    Raises:
        CalibrationError: if it cannot be read, or holds a text that evaluation uses.
    """
    texts = read_heldout(path)
    try:
        refuse_overlap((text for group in texts.values() for text in group), measured)
    except CalibrationError as error:
        raise CalibrationError(f"{name} table {path}: {error}") from None
    return texts
