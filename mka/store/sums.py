"""SHA256SUMS of a folder, in the format of ``sha256sum``: written when a folder is published, checked when reused."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from mka.errors import CheckpointError

SUMS_NAME = "SHA256SUMS"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> Path:
    """Write ``SHA256SUMS`` over every file below ``folder``, so that ``sha256sum -c SHA256SUMS`` passes there.

    Args:
        folder: the folder.
        known: file -> SHA-256 of what was written to it, for files that need not be read again.

    Returns:
        The path of the file written.
    """
    known = known or {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{known.get(name) or file_sha256(folder / name)}  {name}\n" for name in names if name != SUMS_NAME]
    target = folder / SUMS_NAME
    target.write_text("".join(lines), encoding="utf-8", newline="\n")
    return target


def verify_sums(folder: Path) -> bool:
    """Compare the files of ``folder`` with its ``SHA256SUMS``; files the list does not name are not looked at.

    Returns:
        True if every listed file has its recorded digest; False if the folder has no ``SHA256SUMS``.

    Raises:
        CheckpointError: naming the first file that is missing or altered, or the line that cannot be read.
    """
    listed = read_sums(folder)
    paths = [folder / name for name in listed]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {SUMS_NAME} lists it; fetch it again")
    with ThreadPoolExecutor() as pool:  # hashing runs outside Python's lock
        for path, expected, found in zip(paths, listed.values(), pool.map(file_sha256, paths)):
            if found != expected:
                raise CheckpointError(f"{path} is altered: expected sha256 {expected}, found {found}; fetch it again")
    return bool(listed)


def read_sums(folder: Path) -> dict[str, str]:
    """Read what the ``SHA256SUMS`` of a folder lists: file -> digest; nothing if it has none.

    Raises:
        CheckpointError: naming the line that cannot be read, or the file that is listed twice.
    """
    listing = folder / SUMS_NAME
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{listing} cannot be read ({error}); fetch the folder again") from None
    if not lines:
        raise CheckpointError(f"{listing} is empty; fetch the folder again")
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        expected, separator, name = line.partition("  ")
        if not separator or len(expected) != 64 or not name:
            raise CheckpointError(f"{listing}, line {number}: expected '<sha256>  <file>'; fetch the folder again")
        name = PurePosixPath(name).as_posix()
        if name in listed:
            raise CheckpointError(f"{listing}, line {number}: lists {name} again; fetch the folder again")
        listed[name] = expected
    return listed
