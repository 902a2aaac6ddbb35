"""What a command says: its result on stdout (text or one JSON document), progress on stderr, a refusal in one line."""

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mka.errors import MkaError, OutputError

ARGUMENTS = "mka.arguments"


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        document: for machines, JSON-able.
        text: for people.
        refusal: raised after both were printed; decides the exit code.
    """

    document: Any
    text: str
    refusal: MkaError | None = None


def examples(*lines: str) -> str:
    """Lay out command lines as the end of a help page."""
    return "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {line}".rstrip() for line in lines)])


def say(line: str) -> None:
    """Print a line of progress on stderr, unless bars are off: then nobody watches."""
    from mka.progress import is_shown

    if is_shown():
        click.echo(line, err=True)


def reports(command: Callable[..., Outcome]) -> Callable[..., None]:
    """Give a command ``--json`` and print the `Outcome` it returns; nothing else reaches stdout."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of text.")
    @functools.wraps(command)
    def run(*args: Any, as_json: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            outcome = command(*args, **options)
        click.echo(json.dumps(outcome.document, indent=2, default=str) if as_json else outcome.text)
        if outcome.refusal is not None:
            raise outcome.refusal

    return run


def typed() -> str:
    """Return the command as it was typed, for the record."""
    import shlex

    arguments = click.get_current_context().find_root().meta.get(ARGUMENTS, ())
    return shlex.join(["mka", *arguments])


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


def write_file(output: Path, write: Callable[[Path], Any]) -> None:
    """Write one file aside and rename it into place.

    Args:
        output: the file; must not exist.
        write: called with the path to write to.

    Raises:
        OutputError: if it exists or cannot be written.
    """
    check_free(output)
    aside = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        aside.replace(output)
    except OSError as error:
        raise OutputError(f"output {output} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def align(rows: list[list[Any]], headers: list[str], right: str = "") -> str:
    """Lay out a table with a header line.

    Args:
        rows: cells, printed as they are.
        headers: column names.
        right: one letter per column, ``r`` or ``l``; columns without one are left-aligned.
    """
    from tabulate import tabulate

    sides = tuple("right" if side == "r" else "left" for side in right.ljust(len(headers), "l"))
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=sides if rows else None)
