"""Files and folders written whole or not at all: made aside, moved into place by one rename."""

import contextlib
import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mka.errors import MkaError, OutputError


def _name_aside(path: Path) -> Path:
    """Name what is written in a path's place until it is whole, by machine and process: it can be told who is gone."""
    return path.with_name(f".{path.name}.partial-{_machine()}-{os.getpid()}-{os.urandom(4).hex()}")


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())


def _sweep(path: Path) -> None:
    """Remove what processes of this machine that are gone left in a path's place."""
    written = re.compile(rf"{re.escape(f'.{path.name}.partial-{_machine()}-')}(\d+)-[0-9a-f]{{8}}")
    for left in path.parent.iterdir():
        match = written.fullmatch(left.name)
        if match is None or _is_alive(int(match[1])):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write one file aside and rename it into place, so that a reader never sees half of it.

    Args:
        path: the file; one that exists is replaced, a folder that is missing is made.
        write: called with the path to write to, beside ``path`` and known to no other writer.

    Raises:
        OutputError: if it cannot be written; nothing is left aside.
    """
    aside = _name_aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        write(aside)
        aside.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write or replace a file of text, UTF-8 and with its line ends as they are; refusals as `replace_file`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write or replace a file; refusals as `replace_file`."""
    replace_file(path, lambda aside: aside.write_bytes(data))


def write_file(output: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that must not exist yet.

    Args:
        output: the file.
        write: called with the path to write to.

    Raises:
        OutputError: if it exists or cannot be written.
    """
    check_free(output)
    replace_file(output, write)


def check_free(output: Path) -> None:
    """Refuse an output that exists, before anything is computed for it.

    Raises:
        OutputError: if it exists, or its place cannot be looked at.
    """
    try:
        exists = output.is_symlink() or output.exists()
    except OSError as error:
        raise OutputError(f"output {output} cannot be written: {error.strerror}") from None
    if exists:
        raise OutputError(f"output {output} exists; choose another name or remove it")
    parent = next((folder for folder in output.absolute().parents if folder.exists()), None)
    if parent is None or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"output {output} cannot be written: {parent} is not a writable folder")


@contextmanager
def publish(output: str | Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder beside ``output``; rename it into place when the block ends without an exception.

    Nothing is left behind when it does not: ``output`` either holds the whole result or does not exist.

    Args:
        output: the folder to publish; must not exist.
        needed_bytes: refuse early if the disk has less room than this.

    Raises:
        OutputError: if ``output`` exists, cannot be written, or the disk is full.
    """
    output = Path(output)
    if output.exists():
        raise OutputError(f"output {output} exists; choose another folder or remove it")
    partial = _name_aside(output)
    try:
        _make_room(output.parent, partial)
        _sweep(output)
        _refuse_full(output, partial, needed_bytes)
        yield partial
        _sync_files(partial)
        partial.replace(output)
        _sync(output.parent)
    except Exception as error:
        if _says_full(error):
            raise OutputError(f"disk full while writing {output}; free some space and run again") from None
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(f"output {output} appeared while it was being written; nothing was replaced") from None
        if isinstance(error, PermissionError | NotADirectoryError) or error.errno == errno.EROFS:
            raise OutputError(f"output {output} cannot be written: {error.strerror}") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _says_full(error: Exception) -> bool:
    """Whether a disk is full; a library that writes below Python says so in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return not isinstance(error, MkaError) and os.strerror(errno.ENOSPC) in str(error)


def make_work(folder: Path) -> None:
    """Make the work folder, for its owner alone: it holds texts and databases. One that exists is left as it is.

    Raises:
        OutputError: if it cannot be made or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"work folder {folder} cannot be written: {error.strerror}; set MKA_WORK to one that can"
        ) from None


def check_room(output: Path, needed_bytes: int) -> None:
    """Refuse an output that could not be published later, before anything is computed for it; leaves nothing.

    Raises:
        OutputError: if its place cannot be written, or the disk has less than ``needed_bytes``.
    """
    place = next(folder for folder in output.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place):
            _refuse_full(output, place, needed_bytes)
    except OSError as error:
        raise OutputError(f"output {output} cannot be written: {error.strerror or error}") from None


def _refuse_full(output: Path, place: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise OutputError(
            f"disk full: {output} needs {needed_bytes / 1e6:,.0f} MB, {output.parent} has {free / 1e6:,.0f} MB free"
        )


def _make_room(parent: Path, partial: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"output cannot be written in {parent}: {error.strerror or error}") from None


def _sync_files(folder: Path) -> None:
    """Wait until the disk has every file below a folder: a rename must not outlive a power cut that they do not."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
