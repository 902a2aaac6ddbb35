"""Tables at a DVC revision: which content a path has there, and a private copy of it to read from."""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.errors import CalibrationError
from mka.outside.project import is_project, suggest_table
from mka.store.products import Product, produce
from mka.store.sums import file_sha256
from tasks.machine.workplace import Workplace

VERSION = 2
# What recipes say where they name no revision.
LATEST = "HEAD"


@dataclass(frozen=True)
class Version:
    """Content of one path.

    Attributes:
        path: as the recipe names it.
        rev: commit it was read at; None for the working copy.
        digest: DVC's MD5 of the file or folder at that commit, or a SHA-256 of the working copy.
    """

    path: str
    rev: str | None
    digest: str

    @property
    def copy(self) -> str:
        """Where its copy lies among others: two tables of one file name are two, and the name stays readable."""
        return f"{hashlib.sha256(self.digest.encode()).hexdigest()[:16]}/{Path(self.path).name}"


def resolve_versions(
    place: Workplace, paths: Sequence[Path], rev: str | None, key: str = "calibration.rev"
) -> dict[str, Version]:
    """Look up what each path holds at a revision, without reading it.

    Paths outside the project, paths DVC does not track, and everything when ``rev`` is None are taken from the
    working copy, and so is everything where there is no project. ``key`` is the recipe's key of the revision, for
    messages.

    Raises:
        CalibrationError: if a path exists neither at the revision nor in the working copy, or a revision is named where
            there is no project.
    """
    versions: dict[str, Version] = {}
    tracked = None
    if rev is not None and is_project(place.root):
        tracked = _open(place, rev, key)
    elif rev not in (None, LATEST):
        raise CalibrationError(
            f"{key} {rev!r}: {place.root} is in no project of DVC's, and tables have no revisions; give null, which "
            "reads them as they are, or run it where the project is"
        )
    for path in paths:
        absolute = place.path(path)
        found = None
        if tracked is not None and absolute.is_relative_to(place.root):
            found = _tracked_digest(tracked, absolute.relative_to(place.root).as_posix())
        if found is not None and tracked is not None:
            versions[str(path)] = Version(str(path), tracked.commit, found)
        elif absolute.exists():
            versions[str(path)] = Version(str(path), None, _digest_working_copy(absolute))
        else:
            raise CalibrationError(f"table not found: {path} (revision {rev or 'working copy'}); {suggest_table()}")
    return versions


def copy_tables(place: Workplace, versions: Mapping[str, Version]) -> Product:
    """Copy tables at their versions into a stage result, so that nothing edited meanwhile is read.

    Raises:
        CalibrationError: if the content of a version is neither in the DVC cache nor in its remote, or a table was
            edited after its digest was taken.
    """

    def make(folder: Path) -> dict[str, Any]:
        for version in versions.values():
            target = folder / version.copy
            if not target.exists():  # the same content under the same name in two places
                target.parent.mkdir(exist_ok=True)
                _copy(place, version, target)
        return {"tables": {v.path: {"rev": v.rev, "digest": v.digest} for v in versions.values()}}

    settings = {"names": sorted({v.copy for v in versions.values()})}
    inputs = {v.copy: v.digest for v in versions.values()}
    return produce(place.stages, "tables", version=VERSION, settings=settings, inputs=inputs, make=make)


def _copy(place: Workplace, version: Version, target: Path) -> None:
    if version.rev is None:
        source = place.path(Path(version.path))
        try:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        except (OSError, shutil.Error) as error:
            raise CalibrationError(f"table {version.path} cannot be copied: {error}") from None
        _require_same(version, _digest_working_copy(target))
        return
    tracked = _open(place, version.rev)
    inside = place.path(Path(version.path)).relative_to(place.root).as_posix()
    try:
        is_folder = tracked.files.isdir(inside)
        tracked.files.get(inside, str(target), recursive=is_folder)
    except Exception as error:
        raise CalibrationError(
            f"{version.path} at revision {version.rev[:12]} is not in the DVC cache ({type(error).__name__}); "
            "`dvc pull` fetches it, `dvc repro` rebuilds it"
        ) from None
    found = _digest_as_dvc(target)
    # Older DVC digested text with the line ends of Unix.
    if found == version.digest or _digest_as_dvc(target, unix_ends=True) != version.digest:
        _require_same(version, found)


def _digest_as_dvc(path: Path, unix_ends: bool = False) -> str:
    """Return the digest that DVC records of a file, or of the list of a folder's files."""

    def digest(file: Path) -> str:
        data = file.read_bytes()
        return hashlib.md5(data.replace(b"\r\n", b"\n") if unix_ends else data, usedforsecurity=False).hexdigest()

    if path.is_file():
        return digest(path)
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree = Tree()
    for file in path.rglob("*"):
        if file.is_file():
            tree.add(file.relative_to(path).parts, None, HashInfo("md5", digest(file)))
    tree.digest()
    return str(tree.oid)


def _require_same(version: Version, found: str) -> None:
    if found != version.digest:
        raise CalibrationError(
            f"table {version.path} is not what it was a moment ago: digest {found[:16]}, was {version.digest[:16]}; "
            "it was edited meanwhile, run again"
        )


@dataclass(frozen=True)
class _Tracked:
    files: Any
    commit: str


def _open(place: Workplace, rev: str, key: str = "calibration.rev") -> _Tracked:
    logging.getLogger("dvc").setLevel(logging.ERROR)
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo

    try:
        with Repo(str(place.root)) as repo:
            commit = repo.scm.resolve_rev(rev)
        return _Tracked(DVCFileSystem(str(place.root), rev=commit), commit)
    except Exception as error:
        raise CalibrationError(
            f"DVC revision {rev!r} cannot be read: {' '.join(str(error).split())}; give an existing Git revision "
            f"as {key}, or null for the working copy"
        ) from None


def _tracked_digest(tracked: _Tracked, path: str) -> str | None:
    try:
        info = tracked.files.info(path)
    except FileNotFoundError:
        return None
    entry = info.get("dvc_info") or {}
    value = entry.get("md5")
    if value is None and (entry.get("entry") is not None):
        value = entry["entry"].hash_info.value
    return value


def _digest_working_copy(path: Path) -> str:
    if path.is_file():
        return file_sha256(path)
    lines = [f"{file_sha256(f)}  {f.relative_to(path).as_posix()}" for f in sorted(path.rglob("*")) if f.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
