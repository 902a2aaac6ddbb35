"""The texts an alignment is fitted on, read and checked before anything is computed, and the record of the fit."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mka.errors import RecipeError, nearest
from mka.model.checkpoint import Checkpoint
from mka.recipe import AlignmentFit, ModelSource
from mka.texts.overlap import read_apart
from mka.texts.positions import check_context
from mka.texts.rows import digest_sources

FORMAT = "mka-alignment/1"


@dataclass(frozen=True)
class AlignmentTable:
    """What one alignment is fitted on.

    Attributes:
        texts: source -> its texts.
        settings: tokens, windows and penalty.
        windows: source -> windows that are cut of it for the model at hand; empty until `fit_windows`.
    """

    texts: Mapping[str, Sequence[str]]
    settings: AlignmentFit
    windows: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over sources and texts."""
        return digest_sources(self.texts)

    @property
    def tokens(self) -> int:
        """Tokens fitted on."""
        return sum(self.windows.values()) * self.settings.context


def open_alignment(path: Path, settings: AlignmentFit, measured: Iterable[str]) -> AlignmentTable:
    """Read an alignment table.

    Args:
        path: JSON lines with ``text`` and ``source``.
        settings: what it is used with.
        measured: every text that evaluation uses.

    Raises:
        CalibrationError: if it cannot be read, or holds a text that evaluation uses.
    """
    return AlignmentTable(read_apart(path, measured, "alignment"), settings)


def fit_windows(table: AlignmentTable, checkpoint: Checkpoint) -> AlignmentTable:
    """Count the windows a model's tokenizer makes of a table; refuses what the fit itself would refuse later.

    Raises:
        CalibrationError: if there is too little text.
        RecipeError: if windows are longer than the model reads, or no source can be left out.
    """
    from mka.model.loading import load_tokenizer
    from mka.texts.windows import deal_windows

    settings = table.settings
    check_context(settings.context, checkpoint.config.get("max_position_embeddings"), "alignment.context")
    tokenizer = load_tokenizer(checkpoint.path)
    dealt = deal_windows(tokenizer, table.texts, context=settings.context, tokens=settings.tokens)
    windows = {source: len(rows) for source, rows in dealt.items()}
    if settings.penalty == "auto":
        find_heldout(windows, settings)
    return AlignmentTable(table.texts, settings, windows)


def find_heldout(windows: Mapping[str, int], settings: AlignmentFit) -> str:
    """Return the source the penalty is chosen on: the one named, or the second largest.

    Raises:
        RecipeError: if it has no window, or is all there is.
    """
    named = settings.heldout_source
    sources = sorted(windows, key=lambda source: (-windows[source], source))
    if len(sources) < 2:
        raise RecipeError(
            f"alignment.penalty 'auto' leaves one source out, and {sources[0]!r} is all there is; give a number"
        )
    if named is None:
        return sources[1]
    if named not in sources:
        raise RecipeError(
            f"alignment.heldout_source {named!r} has no window{nearest(named, sources)}; sources: {', '.join(sources)}"
        )
    return named


def estimate_memory(table: AlignmentTable, checkpoint: Checkpoint, source: ModelSource, competing: int) -> int:
    """Estimate what a walk holds beside the model, in bytes.

    Args:
        table: of `fit_windows`.
        checkpoint: the base.
        source: precision of the forward passes.
        competing: layers that compete for one output layer.
    """
    width, inner = checkpoint.config["hidden_size"], competing * checkpoint.config["intermediate_size"]
    size = 4 if source.dtype == "float32" else 2
    return walk_nbytes(round((1 + table.settings.copies) * table.tokens), width, inner, size)


def walk_nbytes(tokens: int, width: int, inner: int, size: int) -> int:
    """Estimate what a walk over so many tokens holds beside the model, in bytes.

    Six arrays of hidden states, tokens x D, and one of features, tokens x F, in the precision of the forward passes;
    three (F, F) matrices of moments in float64.

    Args:
        tokens: fitted on or walked along.
        width: D.
        inner: F, the width of the MLP, of all layers that compete together.
        size: bytes of one number of a forward pass.
    """
    return tokens * (6 * width + inner) * size + 3 * inner * inner * 8


def alignment_json(facts: Mapping[str, Any], table_digest: str) -> str:
    """Serialise the facts of a fit (docs/formats.md)."""
    return json.dumps({"format": FORMAT, "table_digest": table_digest, **facts}, indent=2) + "\n"
