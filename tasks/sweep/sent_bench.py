"""A comparison as it is sent to another process: what is needed to open it there, and to know that it is the same.

An opened comparison holds locks and models, which cannot be sent.
"""

import hashlib
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from mka.bench.parts import Bench
from mka.bench.recipe import BenchRecipe
from mka.errors import RecipeError
from tasks.machine.workplace import find_workplace

_OPENED: dict[str, Bench] = {}
_OPENING = Lock()


@dataclass(frozen=True)
class SentBench:
    """What crosses the border between two processes.

    Attributes:
        recipe: as written: its relative paths start at the checkout of whoever opens it.
        work: work folder, which all processes share.
        command: what makes all of it again.
        digest: of model and texts; whoever opens it has to find the same.
    """

    recipe: BenchRecipe
    work: Path
    command: str
    digest: str


def send_bench(recipe: BenchRecipe, bench: Bench) -> SentBench:
    """Describe an opened comparison, so that another process can open it.

    Args:
        recipe: the recipe it was opened from, before its paths were resolved.
        bench: the opened comparison.
    """
    return SentBench(recipe, bench.work, bench.command, digest_inputs(bench))


def digest_inputs(bench: Bench) -> str:
    """Digest what is read from disk: base, texts that are looked at, measured texts, tables of tasks."""
    inputs = bench.inputs
    tables = [table.digest if table else None for table in (inputs.calibration, inputs.alignment, inputs.healing)]
    found = [bench.base.digest, bench.revision, *tables, dict(bench.digests)]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def open_bench(sent: SentBench) -> Bench:
    """Open a comparison that was sent, once per process.

    Raises:
        RecipeError: if this process finds another model or other texts than the sender, or another work folder.
        MkaError: whatever else is refused before anything is computed.
    """
    from mka.bench.cells import find_base
    from mka.bench.prepare import prepare

    key = f"{sent.work} {sent.digest} {sent.recipe.model_dump_json()}"
    with _OPENING:
        if key in _OPENED:
            return _OPENED[key]
        _OPENED.clear()  # a worker may outlive many sweeps
        where = f"worker on {socket.gethostname()}"
        share = f"all workers must share the sweep's work folder {sent.work}"
        if not (sent.work / "stages").is_dir():
            raise RecipeError(f"{where}: there is no such folder; {share}")
        bench = prepare(sent.recipe, sent.work, root=find_workplace().root, command=sent.command)
        if digest_inputs(bench) != sent.digest:
            raise RecipeError(
                f"{where} finds another model or other texts than the sweep; its checkout must be the same"
            )
        if find_base(bench) is None:
            raise RecipeError(f"{where} finds no measurements of the base; {share}")
        _OPENED[key] = bench
        return bench
