"""A work folder with stored results of any age, and what cleaning takes of it."""

import os
import time
from datetime import timedelta
from pathlib import Path

from mka.store.cleaning import clean
from mka.store.products import find, produce

DAY = 86400.0
MONTH = timedelta(days=30)


def make_work_folder(place: Path) -> Path:
    folder = place / "work"
    (folder / "stages").mkdir(parents=True)
    return folder


def age(path: Path, days: float) -> Path:
    """Make a path look written that many days ago, with everything below it."""
    then = time.time() - days * DAY
    for part in (*path.rglob("*"), path):
        os.utime(part, (then, then), follow_symlinks=False)
    return path


def make(work: Path, number: int = 0, stage: str = "merge", content: str = "weights"):
    """Store one result as every stage does."""

    def write(folder: Path):
        (folder / "model").mkdir()
        (folder / "model" / "x.bin").write_text(content)
        return {"number": number}

    return produce(work / "stages", stage, version=1, settings={"number": number}, inputs={}, make=write)


def look(work: Path, number: int = 0):
    return find(work / "stages", "merge", version=1, settings={"number": number}, inputs={})


def paths(work: Path) -> set[str]:
    return {path.relative_to(work).as_posix() for path in work.rglob("*")}


def gone(work: Path, limit: timedelta = MONTH, **options) -> dict[str, str]:
    """Clean; return the kind of everything that went but lock files."""
    found = clean(work, limit, **options)
    return {item.path.as_posix(): item.kind for item in found.removed if item.kind != "stale lock"}
