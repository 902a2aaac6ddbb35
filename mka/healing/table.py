"""The texts a model is healed on: one source measures, the others train."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import CalibrationError, RecipeError, nearest
from mka.model.checkpoint import Checkpoint
from mka.recipe import LEAST_HEALING, HealFit
from mka.texts.overlap import read_apart
from mka.texts.positions import check_context
from mka.texts.rows import digest_sources

if TYPE_CHECKING:
    import torch

FORMAT = "mka-healing/1"


@dataclass(frozen=True)
class HealingTable:
    """What one healing reads.

    Attributes:
        texts: source -> its texts.
        settings: tokens, windows and the source that measures.
    """

    texts: Mapping[str, Sequence[str]]
    settings: HealFit

    @property
    def digest(self) -> str:
        """SHA-256 over sources and texts."""
        return digest_sources(self.texts)


@dataclass(frozen=True)
class HealingWindows:
    """A table cut for one model.

    Attributes:
        train: token ids, (S, T) int64, source by source.
        heldout: those of the source that only measures, (H, T).
        source: its name.
        windows: source -> windows trained on.
    """

    train: "torch.Tensor"
    heldout: "torch.Tensor"
    source: str
    windows: Mapping[str, int]

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.train.numel()


def open_healing(path: Path, settings: HealFit, measured: Iterable[str]) -> HealingTable:
    """Read a table to heal on.

    Args:
        path: JSON lines with ``text`` and ``source``.
        settings: what it is used with.
        measured: every text that evaluation uses.

    Raises:
        CalibrationError: if it cannot be read, or holds a text that evaluation uses.
    """
    return HealingTable(read_apart(path, measured, "healing"), settings)


def cut_healing(table: HealingTable, checkpoint: Checkpoint, tokenizer: Any = None) -> HealingWindows:
    """Cut windows of a table for a model, each source's from its last text on: alignments read from the first.

    A refit is much nearer to the base on what it was fitted on than on any other text, which would teach, and measure,
    too little.

    Args:
        table: of `open_healing`.
        checkpoint: the base.
        tokenizer: the base's; None reads it.

    Raises:
        CalibrationError: if there is too little text, in all or of the source that measures.
        RecipeError: if windows are longer than the model reads, or no source can be left out.
    """
    import torch

    from mka.model.loading import load_tokenizer
    from mka.texts.windows import deal_windows, pack_windows

    settings = table.settings
    check_context(settings.context, checkpoint.config.get("max_position_embeddings"), "heal.context")
    tokenizer = tokenizer or load_tokenizer(checkpoint.path)
    heldout = choose_heldout(table)
    wanted = max(2, settings.heldout_tokens // settings.context)
    measuring = pack_windows(tokenizer, table.texts[heldout][::-1], settings.context, wanted)
    if len(measuring) < 2:
        raise CalibrationError(
            f"healing: source {heldout!r} makes {len(measuring)} windows of {settings.context} tokens, at least 2 are "
            "needed to measure on; name another in heal.heldout_source, or lower heal.context"
        )
    others = {source: texts[::-1] for source, texts in table.texts.items() if source != heldout}
    there = sum(len(pack_windows(tokenizer, texts, settings.context)) for texts in others.values()) * settings.context
    if there < settings.tokens:
        fewer = f"lower it to {there:,} or give" if there >= LEAST_HEALING else f"{LEAST_HEALING} are the fewest, give"
        raise CalibrationError(
            f"healing: {there:,} tokens in windows of {settings.context} without source {heldout!r}, which only "
            f"measures; heal.tokens asks for {settings.tokens:,}: {fewer} more text"
        )
    dealt = deal_windows(tokenizer, others, context=settings.context, tokens=settings.tokens)
    counts = {source: len(rows) for source, rows in dealt.items()}
    return HealingWindows(torch.cat(list(dealt.values())), torch.tensor(measuring), heldout, counts)


def choose_heldout(table: HealingTable) -> str:
    """Return the source that measures: the one named, or the second largest by characters.

    Raises:
        RecipeError: if it is not there, or is all there is.
    """
    sizes = {source: sum(map(len, texts)) for source, texts in table.texts.items()}
    sources = sorted(sizes, key=lambda source: (-sizes[source], source))
    named = table.settings.heldout_source
    if len(sources) < 2:
        raise RecipeError(
            f"healing stops by a source it does not train on, and {sources[0]!r} is all there is; give a table with "
            "two sources"
        )
    if named is None:
        return sources[1]
    if named not in sources:
        raise RecipeError(
            f"heal.heldout_source {named!r} is not in the table{nearest(named, sources)}; sources: {', '.join(sources)}"
        )
    return named


def healing_json(facts: Mapping[str, Any], table_digest: str) -> str:
    """Serialise the facts of a healing (docs/formats.md)."""
    return json.dumps({"format": FORMAT, "table_digest": table_digest, **facts}, indent=2) + "\n"
