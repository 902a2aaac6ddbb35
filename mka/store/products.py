"""Stage results on disk, keyed by content: the one mechanism by which anything is ever reused.

A result's key is the digest of its stage, the stage's version, its settings and the digests of its inputs: never a
name, a date or a path. It is reused only if every file it consists of still has its recorded digest.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.errors import StoreError
from mka.store.manifests import MANIFEST, digest_manifest, read_manifest
from mka.store.nearest import explain_missing
from mka.store.publishing import publish
from mka.store.sums import file_sha256

FORMAT = "mka-stage/1"

# What was opened since the innermost `reading` began; None outside of one.
_opened: ContextVar["dict[Path, Product] | None"] = ContextVar("opened", default=None)


@dataclass(frozen=True)
class Product:
    """What one stage left behind.

    Attributes:
        stage: name of the stage.
        key: SHA-256 over stage, version, settings and input digests.
        folder: where its files are; `open` before reading them.
        files: relative name -> SHA-256 of each.
        digest: SHA-256 over its files, or over its facts if it has none.
        facts: JSON-able facts for checks, records and people.
        seconds: what making it took.
        reused: whether an earlier run made it.
        why: one line that says why it was made or reused.
    """

    stage: str
    key: str
    folder: Path
    files: Mapping[str, str]
    digest: str
    facts: Mapping[str, Any]
    seconds: float
    reused: bool
    why: str

    def open(self) -> Path:
        """Return the folder, once its files are what the stage left behind.

        Raises:
            StoreError: naming the file that is gone, altered, or was not there.
        """
        opened = _opened.get()
        if opened is None or self.folder not in opened:
            _verify(self)
        if opened is not None:
            opened[self.folder] = self
        return self.folder


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Compare what is opened within the block with its digests, when it is opened and once more at the end.

    What was made of files that changed meanwhile is then not kept.

    Raises:
        StoreError: as `Product.open`.
    """
    token = _opened.set({})
    try:
        yield
        for product in (_opened.get() or {}).values():
            _verify(product)
    finally:
        _opened.reset(token)


def _verify(product: Product) -> None:
    fault = _find_fault(product.folder, product.files)
    if fault is None:
        return
    name, what = fault
    file, again = product.folder / name, "nothing was made of it; the same command makes it again"
    if what == _STRANGE:
        raise StoreError(f"{file} was not written by stage {product.stage!r}; remove it, or the folder: {again}")
    raise StoreError(f"{file} {what} since stage {product.stage!r} wrote it: {again}")


_GONE, _CHANGED, _STRANGE = "is gone", "has changed", "was not written by the stage"


def _find_fault(folder: Path, files: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the first file that is not what a stage left behind, and what is wrong with it; None if all are."""
    there = _list_files(folder)
    for name, digest in files.items():
        file = there.pop(name, None)
        try:
            if file is None or not file.is_file():
                return name, _GONE
            if file_sha256(file) != digest:
                return name, _CHANGED
        except OSError:
            return name, _GONE
    strange = sorted(there.keys() - {MANIFEST})
    return (strange[0], _STRANGE) if strange else None


def _list_files(folder: Path) -> dict[str, Path]:
    return {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if not f.is_dir() or f.is_symlink()}


def stage_key(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Digest of everything that decides a stage's result.

    Args:
        stage: its name.
        version: raised by hand when the stage's meaning changes.
        settings: JSON-able settings; nothing that names a machine, path or time.
        inputs: name -> digest of each input.
    """
    body = {"stage": stage, "version": version, "settings": settings, "inputs": inputs}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def produce(
    store: Path,
    stage: str,
    *,
    version: int,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Callable[[Path], Mapping[str, Any]],
) -> Product:
    """Return the stage's result: the stored one if it is whole, else a new one.

    Two processes that want the same result take turns; the second finds the first one's. A killed process leaves
    nothing that looks like a result, and its lock is released by the operating system.

    Args:
        store: folder of all results.
        stage: name of the stage.
        version: see `stage_key`.
        settings: see `stage_key`.
        inputs: see `stage_key`.
        make: fills an empty folder and returns facts; an exception from it stores nothing.
    """
    from filelock import FileLock

    key = stage_key(stage, version, settings, inputs)
    folder = name_folder(store, stage, key)
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_path(folder)):
        stored, why = _read(folder, key)
        if stored is not None:
            return stored
        why = why or explain_missing(store, stage, version=version, settings=settings, inputs=inputs)
        shutil.rmtree(folder, ignore_errors=True)
        for left in store.glob(f".{folder.name}.partial-*"):  # by a killed process; its lock is ours now
            shutil.rmtree(left, ignore_errors=True)
        started = time.perf_counter()
        with publish(folder) as partial:
            with reading():
                facts = dict(make(partial))
            body = {
                "format": FORMAT,
                "stage": stage,
                "key": key,
                "version": version,
                "settings": settings,
                "inputs": inputs,
                "seconds": round(time.perf_counter() - started, 3),
                "files": {
                    name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
                    for name, file in _list_files(partial).items()
                },
                "facts": facts,
            }
            # As it will be read, whether `make` returned tuples or lists: the digest is of that.
            body = json.loads(json.dumps(body))
            manifest = json.dumps(body | {"sha256": digest_manifest(body)}, indent=2) + "\n"
            (partial / MANIFEST).write_text(manifest, encoding="utf-8")
        shutil.rmtree(find_scratch(folder), ignore_errors=True)
        return _describe(body, folder, reused=False, why=why)


def find(
    store: Path, stage: str, *, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> Product | None:
    """Return the stored result if it is there and whole; waits for nobody and makes nothing."""
    key = stage_key(stage, version, settings, inputs)
    return _read(name_folder(store, stage, key), key)[0]


def name_folder(store: Path, stage: str, key: str) -> Path:
    """Return where a result is, or would be."""
    return store / f"{stage}-{key[:16]}"


def find_scratch(folder: Path) -> Path:
    """Return the folder where the maker of a result may keep what it has so far; whoever keeps something makes it.

    It lies beside the result under its name, so that whoever makes the same result after a killed process finds it. It
    goes when the result is stored, and `mka clean` removes one that nobody wrote to for long.

    Args:
        folder: of the result, or the one that `produce` gave to be filled.
    """
    name = folder.name.removeprefix(".").partition(".partial-")[0]
    return folder.with_name(f".{name}.scratch")


def read_use(folder: Path) -> int:
    """Return when a result was last made or reused, in nanoseconds."""
    return (folder / MANIFEST).stat().st_mtime_ns


def discard(folder: Path, unless_used_since: int | None = None) -> None:
    """Remove a stored result; nobody makes or reads it meanwhile.

    Args:
        folder: of the result; may be gone.
        unless_used_since: of `read_use`; a result that was used later stays.
    """
    from filelock import FileLock

    with FileLock(_lock_path(folder)):
        if unless_used_since is None or ((folder / MANIFEST).exists() and read_use(folder) <= unless_used_since):
            shutil.rmtree(folder, ignore_errors=True)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _read(folder: Path, key: str) -> tuple[Product | None, str]:
    """Return the stored product, or None and why it cannot be used; empty if there is none."""
    try:
        body = read_manifest(folder)
    except FileNotFoundError:
        return None, ""
    if body is None:
        return None, "the stored result's manifest is damaged"
    if body.get("format") != FORMAT or body["key"] != key:
        return None, "the stored result is of another format or key"
    fault = _find_fault(folder, {name: entry["sha256"] for name, entry in body["files"].items()})
    if fault is not None:
        return None, f"stored file {fault[0]} {fault[1]}"
    # `mka clean` removes what was not used for long. A store that cannot be written is no reason to stop.
    with contextlib.suppress(OSError):
        os.utime(folder / MANIFEST)
    count = len(body["files"])
    why = "same inputs and settings" + (f"; {count} file{'s' if count > 1 else ''} intact" if count else "")
    return _describe(body, folder, reused=True, why=why), why


def _describe(body: Mapping[str, Any], folder: Path, *, reused: bool, why: str) -> Product:
    files = {name: entry["sha256"] for name, entry in body["files"].items()}
    digest = hashlib.sha256(json.dumps(files or body["facts"], sort_keys=True).encode()).hexdigest()
    return Product(body["stage"], body["key"], folder, files, digest, body["facts"], body["seconds"], reused, why)
