"""Python packages as carriers of models and data: fetched as wheels, checked, unzipped, never installed."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mka.errors import OutputError, PackageError
from mka.store.sums import file_sha256

REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)")


def split_requirement(requirement: str) -> tuple[str, str]:
    """Split a pinned requirement ``NAME==VERSION``.

    Raises:
        PackageError: if it is not of that form.
    """
    match = REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise PackageError(f"package must be pinned as NAME==VERSION, got {requirement!r}")
    return match["name"], match["version"]


def fetch_package(requirement: str, folder: Path, sha256: str | None = None) -> Path:
    """Download the wheel of a pinned package, or find it already there.

    Args:
        requirement: ``NAME==VERSION``.
        folder: where wheels are kept; made if absent.
        sha256: expected digest of the wheel, 64 hex digits; without one, zip's own checksums are all that is checked.

    Returns:
        The wheel, inside ``folder``.

    Raises:
        PackageError: if the download fails or its digest is not the expected one.
        OutputError: if ``folder`` cannot be written.
    """
    name, version = split_requirement(requirement)
    with _output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[-_.]+", "_", name)
        for wheel in sorted(folder.glob("*.whl")):
            if wheel.name.lower().startswith(f"{stem}-{version}-".lower()) and _is_intact(wheel, sha256):
                return wheel
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as aside:
            _download(requirement, Path(aside))
            wheels = list(Path(aside).glob("*.whl"))
            if len(wheels) != 1:
                raise PackageError(f"package {requirement}: expected one wheel, pip left {len(wheels)}")
            found = file_sha256(wheels[0])
            if sha256 is not None and found != sha256:
                raise PackageError(f"package {requirement}: expected sha256 {sha256}, found {found}; check the pin")
            return wheels[0].replace(folder / wheels[0].name)


def extract(wheel: Path, prefix: str, folder: Path) -> list[Path]:
    """Unzip the members of ``wheel`` whose names start with ``prefix``.

    Args:
        wheel: a wheel or any other zip file.
        prefix: a folder inside it with its final slash, or one member's full name.
        folder: receives the members, named from the last slash of ``prefix`` on.

    Raises:
        PackageError: if the file is damaged, has no such member, or a member's path leaves ``folder``.
        OutputError: if ``folder`` cannot be written.
    """
    base = prefix.rpartition("/")[0]
    written = []
    try:
        with zipfile.ZipFile(wheel) as archive, _output_errors(folder):
            members = [item for item in archive.infolist() if item.filename.startswith(prefix) and not item.is_dir()]
            for item in members:
                name = PurePosixPath(item.filename[len(base) + 1 if base else 0 :])
                if name.is_absolute() or ".." in name.parts:
                    raise PackageError(
                        f"{wheel.name}: member {item.filename!r} would be written outside {folder}; refused"
                    )
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(item) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                written.append(target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as problem:
        raise PackageError(f"{wheel} is damaged ({problem}); delete it and run again") from None
    if not written:
        raise PackageError(f"{wheel.name} holds nothing under {prefix!r}; check the package's version")
    return written


def read_blocks(wheel: Path, member: str) -> Iterator[bytes]:
    """Yield one member's content, a megabyte at a time.

    Raises:
        PackageError: if the file is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while block := source.read(1 << 20):
                yield block
    except (zipfile.BadZipFile, zlib.error, EOFError) as problem:
        raise PackageError(f"{wheel} is damaged ({problem}); delete it and run again") from None


def _download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        # pip reports a full disk as a bare "Exception:" with its traceback.
        if os.strerror(errno.ENOSPC) in result.stderr:
            raise OutputError(f"disk full while downloading {requirement} to {folder}; free some space and run again")
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (errors or lines or [f"pip ended with code {result.returncode}"])[-1]
        raise PackageError(f"package {requirement} cannot be downloaded: {reason}")


def _is_intact(wheel: Path, sha256: str | None) -> bool:
    if sha256 is not None:
        return file_sha256(wheel) == sha256
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False


@contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise OutputError(f"{folder} cannot be written: {problem.strerror or problem}") from None
