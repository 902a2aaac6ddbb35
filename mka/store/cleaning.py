"""The size policy of the work folder: what was not used for long goes, and so does what killed processes left.

Everything removed here can be made again. Nothing is removed while a process holds the lock that `mka.store.products`
or `mka.bench.cells` take for it, and whatever is not known by name stays.
"""

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from mka.errors import DurationError, OutputError
from mka.outside.reading import read_json
from mka.store.manifests import MANIFEST
from mka.store.sums import SUMS_NAME

UNITS = {"h": "hours", "d": "days", "w": "weeks"}
STAGE = re.compile(r"[a-z0-9_-]+-[0-9a-f]{16}")
BENCH = re.compile(r"[0-9a-f]{16}")
# What `tempfile` makes beside models and wheels; nobody holds a lock for those, so a day without a write decides.
TEMPORARY = re.compile(r"\..+-([a-z0-9_]{8}|clean\d+)")
# The same beside stages' results: candidates that a search heals.
HEALED = re.compile(r"\.healed-[a-z0-9_]{8}")
ABANDONED = timedelta(days=1)


@dataclass(frozen=True)
class Removal:
    """One thing that goes, or would go.

    Attributes:
        kind: what it is, e.g. "stage result".
        path: relative to the work folder.
        size: bytes.
        unused: seconds since it was last used or written.
    """

    kind: str
    path: Path
    size: int
    unused: float


@dataclass
class Cleaning:
    """What a cleaning found.

    Attributes:
        removed: what went, or in a dry run would go.
        notes: one line per thing that stays for a reason worth knowing.
    """

    removed: list[Removal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_duration(text: str) -> timedelta:
    """Read ``12h``, ``30d`` or ``2w``.

    Raises:
        DurationError: if it is none of these, or not above zero.
    """
    match = re.fullmatch(r"([0-9]{1,6})([hdw])", text.strip())
    if match is None or int(match[1]) == 0:
        raise DurationError(
            f"duration {text!r} is not a whole number above 0 with h, d or w (hours, days, weeks); write e.g. 12h, "
            "30d or 2w"
        )
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def clean(work: Path, older_than: timedelta, *, models: bool = False, dry_run: bool = False) -> Cleaning:
    """Remove from the work folder what was not used for ``older_than``, and what killed processes left.

    Args:
        work: the work folder; links in it are neither followed nor removed.
        older_than: stage results, wheels and models used since stay. Take longer than the longest run: what a run read
            at its start it may read again at its end.
        models: whether built base models go, too.
        dry_run: remove nothing.

    Raises:
        OutputError: if ``work`` is no work folder, its last_run.json cannot be read, or something cannot be removed.
    """
    root = work.resolve()
    if not any(_is_folder(root / name) for name in ("stages", "models")):
        raise OutputError(
            f"{work} does not look like a work folder: neither stages/ nor models/ is in it; nothing was removed. "
            "Give the one that runs use (MKA_WORK, or data/work)"
        )
    sweep = _Sweep(root, older_than.total_seconds(), _names_of_last_run(root), dry_run)
    sweep.locked("stages", STAGE)
    sweep.locked("bench", BENCH)
    sweep.temporary("stages", "unfinished healing", HEALED)
    sweep.packages()
    sweep.temporary("models", "unfinished model")
    sweep.temporary("registry", "killed promotion")
    if models:
        sweep.models()
    sweep.half_written_records()
    return sweep.found


class _Sweep:
    """One walk through a work folder."""

    def __init__(self, root: Path, limit: float, wanted: frozenset[str], dry_run: bool) -> None:
        self.root, self.limit, self.wanted, self.dry_run = root, limit, wanted, dry_run
        self.found = Cleaning()
        self.busy = False

    def locked(self, area: str, pattern: re.Pattern[str]) -> None:
        """Clean a folder of results: a lock ``.NAME.lock`` each, of unfinished ones ``.partial-*`` and ``.scratch``.

        What an unfinished one has in its scratch folder serves whoever goes on with it, so that only age removes it.
        """
        folder = self.root / area
        entries = [path for path in self._list(folder) if not path.is_symlink()]
        for name in sorted({owner for path in entries if pattern.fullmatch(owner := _owner(path.name))}):
            result, lock = folder / name, folder / f".{name}.lock"
            partials = [path for path in entries if path.name.startswith(f".{name}.partial-")]
            if result.is_symlink() or (not partials and _is_folder(result) and not self._has_expired(result)):
                continue
            with self._hold(lock) as held:
                if not held:
                    continue
                for partial in partials:
                    self._remove("killed run", partial)
                scratch = folder / f".{name}.scratch"
                if scratch in entries and _measure(scratch)[1] > self.limit:
                    self._remove("unfinished result", scratch)
                # Looked at again: whoever held the lock until now may have used it.
                if _is_folder(result):
                    if not self._has_expired(result):
                        continue
                    self._remove("stage result" if area == "stages" else "killed run", result)
                if lock in entries:
                    self._remove("stale lock", lock)
                elif not self.dry_run:
                    lock.unlink(missing_ok=True)  # ours

    def packages(self) -> None:
        """Clean wheels: what was built from them stays, and `mka.sources.packages` fetches them again when asked."""
        for wheel in self._list(self.root / "packages"):
            if wheel.suffix == ".whl" and _is_file(wheel) and _age(wheel) > self.limit:
                self._remove("wheel", wheel)
        self.temporary("packages", "unfinished download")

    def temporary(self, area: str, kind: str, pattern: re.Pattern[str] = TEMPORARY) -> None:
        """Clean temporary folders that nobody wrote to for a day."""
        for path in self._list(self.root / area):
            if pattern.fullmatch(path.name) and _is_folder(path):
                if _measure(path)[1] > ABANDONED.total_seconds():
                    self._remove(kind, path)
                else:
                    self.found.notes.append(f"{area}/{path.name} was written to within a day and stays")

    def models(self) -> None:
        """Clean base models built longer ago than the limit, unless the last run used them or a run goes on."""
        models = [
            path
            for path in self._list(self.root / "models")
            if _is_folder(path) and not path.name.startswith(".") and (path / SUMS_NAME).is_file()
        ]
        models = [path for path in models if path.name not in self.wanted and _age(path / SUMS_NAME) > self.limit]
        if models and self.busy:
            self.found.notes.append("models stay: a process is working in this folder; clean again when it is done")
            return
        for path in models:
            self._remove("base model", path)
        # make's marks that a model was built; without them `make data` builds it again.
        for path in self._list(self.root / "models") if models else []:
            if re.fullmatch(r"\..+-fetched", path.name) and _is_file(path):
                self._remove("mark", path)

    def half_written_records(self) -> None:
        """Clean copies of last_run.json whose writer was killed before renaming it."""
        for path in self._list(self.root):
            if (
                re.fullmatch(
                    r"\.last_run\.json\.(partial-.+|\d+)", path.name
                )  # the second: before there was one writer
                and _is_file(path)
                and _age(path) > ABANDONED.total_seconds()
            ):
                self._remove("killed run", path)

    def _list(self, folder: Path) -> list[Path]:
        """List a folder; nothing if it is absent, or a link that may lead anywhere."""
        if folder.is_symlink():
            note = f"{folder.name} is a link and was not followed"
            self.found.notes += [note] if note not in self.found.notes else []
            return []
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def _has_expired(self, result: Path) -> bool:
        """Say whether a result is old enough; those in work/bench exist only while somebody holds their lock."""
        if result.parent.name == "bench":
            return True
        manifest = result / MANIFEST
        return result.name not in self.wanted and _age(manifest if _is_file(manifest) else result) > self.limit

    @contextlib.contextmanager
    def _hold(self, lock: Path) -> Iterator[bool]:
        """Take a lock without waiting; yields whether it was free. A dry run leaves no lock file behind."""
        from filelock import FileLock, Timeout

        if self.dry_run and not lock.exists():
            yield True
            return
        taken = FileLock(lock, timeout=0)
        try:
            taken.acquire()
        except Timeout:
            self.busy = True
            self.found.notes.append(f"{lock.parent.name}/{_owner(lock.name)} is being worked on and stays")
            yield False
        except OSError as error:
            self.found.notes.append(f"{lock.parent.name}/{lock.name} cannot be locked ({error.strerror}); it stays")
            yield False
        else:
            try:
                yield True
            finally:
                taken.release()

    def _remove(self, kind: str, path: Path) -> None:
        try:
            size, unused = _measure(path)
            if not self.dry_run:
                if path.is_dir():
                    # Out of sight first: nobody finds half of it, and if we are killed the next run knows what it is.
                    aside = path.with_name(f".{path.name.lstrip('.')}.partial-clean{os.getpid()}")
                    shutil.rmtree(path.rename(aside))
                else:
                    path.unlink()
        except FileNotFoundError:  # somebody else cleans, too
            return
        except OSError as error:
            raise OutputError(
                f"{path} cannot be removed: {error.strerror or error}; {len(self.found.removed)} things were removed "
                "before it. Mend its permissions and clean again"
            ) from None
        self.found.removed.append(Removal(kind, path.relative_to(self.root), size, unused))


def _names_of_last_run(root: Path) -> frozenset[str]:
    """Collect every part of every path in last_run.json, so that what it points at is known by name.

    Raises:
        OutputError: if it is there and cannot be read.
    """
    record = root / "last_run.json"
    try:
        found = read_json(record)
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{record} cannot be read ({' '.join(str(error).split())}), so what it points at is not known; nothing "
            "was removed. Run a flow again or remove the file"
        ) from None
    return frozenset(part for text in _strings(found) for part in Path(text).parts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _owner(name: str) -> str:
    """Name the result that an entry is, locks, or was going to be."""
    match = re.fullmatch(r"\.(.+)\.(lock|scratch|partial-.+)", name)
    return match[1] if match else name


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _age(path: Path) -> float:
    """Return the seconds since a path was written; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.lstat().st_mtime
    return 0.0


def _measure(path: Path) -> tuple[int, float]:
    """Return bytes at or below a path, and seconds since the last write anywhere in it; links count as themselves."""
    size = newest = 0.0
    for part in (path, *(path.rglob("*") if path.is_dir() else ())):
        with contextlib.suppress(FileNotFoundError):
            facts = part.lstat()
            newest = max(newest, facts.st_mtime)
            size += facts.st_size if stat.S_ISREG(facts.st_mode) else 0
    return int(size), time.time() - newest
