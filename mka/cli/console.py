"""What a command says: its result on stdout (text or one JSON document), a refusal in one line."""

import contextlib
import functools
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from mka.outside.printable import make_page
from mka.terminal import Outcome, align

if TYPE_CHECKING:
    pass


ARGUMENTS = "mka.arguments"


def examples(*lines: str) -> str:
    """Lay out command lines as the end of a help page."""
    return "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {line}".rstrip() for line in lines)])


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of text.")


def reports(command: Callable[..., Outcome]) -> Callable[..., None]:
    """Give a command ``--json`` and print the `Outcome` it returns; nothing else reaches stdout."""

    @json_option
    @functools.wraps(command)
    def run(*args: Any, as_json: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            outcome = command(*args, **options)
        click.echo(json.dumps(outcome.document, indent=2, default=str) if as_json else make_page(outcome.text))
        if outcome.refusal is not None:
            raise outcome.refusal

    return run


def typed() -> str:
    """Return the command as it was typed, for the record."""
    import shlex

    arguments = click.get_current_context().find_root().meta.get(ARGUMENTS, ())
    return shlex.join(["mka", *arguments])


def show_results(rows: Sequence[dict[str, str]]) -> str:
    """Lay out base, control if there is one, and candidate side by side."""
    headers = [{"ratio": "candidate / base"}.get(key, key) for key in rows[0]] if rows else []
    return align([list(row.values()) for row in rows], headers, "lrrrr"[: len(headers)])
