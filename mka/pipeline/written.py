"""The base's own text as a table: what ``path: base`` names, for every section that reads texts."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.errors import CalibrationError
from mka.model.checkpoint import Checkpoint
from mka.pipeline.holding import hold_base
from mka.recipe import BASE_TEXT, AlignmentFit, CalibrationTexts, HealFit, ModelSource
from mka.store.products import Product, find, produce
from mka.terminal import say_stage
from mka.texts.overlap import refuse_overlap
from mka.texts.rows import format_rows, read_heldout, read_texts
from mka.texts.writing import FEWEST_TOKENS, KINDS, Wanted

TEXTS_FILE = "texts.jsonl"


@dataclass(frozen=True)
class OwnText:
    """The base's own text.

    Attributes:
        file: the table; see `locate_table`.
        facts: tokens, texts, seed, and why how many texts were left out.
        foreseen: whether it has yet to be written; the file's texts then are as many and as long, and say nothing.
    """

    file: Path
    facts: Mapping[str, Any]
    foreseen: bool = False

    def describe(self) -> str:
        """Say in one line what it is."""
        left_out = sum(self.facts["dropped"].values())
        return (
            f"{self.facts['tokens']:,} tokens in {self.facts['texts']} texts, seed {self.facts['seed']}"
            f"{f', {left_out} more left out' if left_out else ''}"
        )


def locate_table(path: Path, own_text: OwnText | None) -> Path:
    """Return the file of a table that a recipe names: the base's own text for ``base``, any other as it is."""
    return own_text.file if path == BASE_TEXT and own_text is not None else path


def refuse_used(own_text: OwnText, measured: Iterable[str]) -> None:
    """Refuse text of the base that evaluation uses: a model may know a benchmark by heart.

    Raises:
        CalibrationError: if there is any, whatever of the table will be read.
    """
    try:
        refuse_overlap(read_texts(own_text.file), measured)
    except CalibrationError as error:
        found = str(error).removesuffix("; remove them")
        raise CalibrationError(f"text of the base: {found}; another seed makes other text") from None


def want_text(
    calibration: CalibrationTexts | None = None,
    alignment: AlignmentFit | None = None,
    heal: HealFit | None = None,
    *,
    seed: int,
) -> Wanted | None:
    """Return how much text the base has to write for the sections that are in use; None if none names it.

    All of them read the same table: what the one that asks most needs. Every source may lose the rest that is no
    window, and healing only measures on one of them.

    Args:
        calibration: None if nothing looks at it.
        alignment: None if nothing is aligned.
        heal: None if nothing is healed.
        seed: of the text.
    """
    tokens, texts = 0, 0
    if calibration is not None and calibration.path == BASE_TEXT:
        tokens, texts = calibration.samples * calibration.max_tokens, calibration.samples
    if alignment is not None and alignment.path == BASE_TEXT:
        tokens = max(tokens, alignment.tokens + KINDS * alignment.context)
    if heal is not None and heal.path == BASE_TEXT:
        trained = -(-heal.tokens * KINDS // (KINDS - 2))
        tokens = max(tokens, max(trained, KINDS * heal.heldout_tokens) + KINDS * heal.context)
    return Wanted(max(tokens, FEWEST_TOKENS), texts, seed) if tokens else None


def write_table(base: Checkpoint, source: ModelSource, wanted: Wanted, store: Path) -> Product:
    """Let the base write; what is stored is not written again.

    Args:
        base: who writes.
        source: precision, and whether the model's own code may run.
        wanted: how much.
        store: folder of all results.

    Returns:
        Its folder holds `TEXTS_FILE`.

    Raises:
        CheckpointError: if the model does not load whole.
        CalibrationError: if nearly nothing it writes is usable.
        NumericsError: if its logits are not finite.
        StoreError: if the base changes meanwhile.
    """
    from mka.evidence.writing import write_texts
    from mka.model.loading import load_model

    def make(folder: Path) -> Mapping[str, Any]:
        with hold_base(base):
            written = write_texts(*load_model(base.path, source.dtype, source.trust_remote_code), wanted)
        (folder / TEXTS_FILE).write_text(format_rows(written.rows), encoding="utf-8")
        facts = {"tokens": written.tokens, "texts": len(written.rows), "seed": wanted.seed}
        return facts | {"dropped": dict(sorted(written.dropped.items()))}

    return produce(store, make=make, **_key(base, source, wanted))


def as_own_text(product: Product) -> OwnText:
    """Return what `write_table` left."""
    return OwnText(product.open() / TEXTS_FILE, product.facts)


def read_sources(file: Path) -> dict[str, int]:
    """Return source -> texts of a table."""
    return {source: len(texts) for source, texts in sorted(read_heldout(file).items())}


@contextmanager
def open_own_text(
    base: Checkpoint, source: ModelSource, wanted: Wanted, store: Path, *, write: bool = True
) -> Iterator[OwnText]:
    """Have the base's own text within the block; arguments and refusals are those of `write_table`.

    Without ``write`` nothing is run: where it is not stored, texts of random words stand in for it.
    """
    if write:
        written = write_table(base, source, wanted, store)
        say_stage("text of the base", written.seconds, written.reused, written.why)
        yield as_own_text(written)
        return
    if (stored := find(store, **_key(base, source, wanted))) is not None:
        yield as_own_text(stored)
        return
    from mka.evidence.writing import imitate_texts
    from mka.model.loading import load_tokenizer

    imitated = imitate_texts(load_tokenizer(base.path, source.trust_remote_code), wanted)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / TEXTS_FILE
        file.write_text(format_rows(imitated.rows), encoding="utf-8")
        facts = {"tokens": wanted.tokens, "texts": len(imitated.rows), "seed": wanted.seed, "dropped": {}}
        yield OwnText(file, facts, foreseen=True)


def _key(base: Checkpoint, source: ModelSource, wanted: Wanted) -> dict[str, Any]:
    from mka.evidence.writing import VERSION

    settings = {"tokens": wanted.tokens, "texts": wanted.texts, "seed": wanted.seed, "dtype": source.dtype}
    return {"stage": "write", "version": VERSION, "settings": settings, "inputs": {"base": base.digest}}
