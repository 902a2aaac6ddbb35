"""What commands of production say, as `mka.cli.console` does for the library's, and what may end them."""

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import click

from flows.command_line import is_interruption, refuse, silence_prefect
from mka.cli.main import main, shorten_program
from mka.errors import MkaError, require_extra
from mka.outside.printable import make_page
from mka.terminal import Outcome, interrupt_on_sigterm, showing

# What they are run with. One that is missing means that the extra was not installed.
LIBRARIES = ("prefect", "mlflow", "dvc", "great_expectations")
EXTRA = "flow"
# Where a command keeps how to go on, among what click's context holds.
HINT = "mka.hint"


def require_libraries(names: Sequence[str] = LIBRARIES) -> None:
    """Refuse a command whose libraries are not installed.

    Raises:
        ExtraError: naming the extra that brings them.
    """
    require_extra(EXTRA, "this command", names)


@dataclass
class Resumption:
    """How to go on after a command that was ended.

    Attributes:
        hint: says it.
        begun: whether something may have been finished; before that only an interruption is told how to go on.
    """

    hint: str = ""
    begun: bool = False

    def after(self, error: BaseException) -> str:
        """Return the hint where it helps: a gate that has spoken says the same again."""
        spoken = getattr(error, "exit_code", MkaError.exit_code) != MkaError.exit_code
        return self.hint if is_interruption(error) or (self.begun and not spoken) else ""


@contextmanager
def resumable(hint: str) -> Iterator[Resumption]:
    """Have what ends the block say how to go on."""
    offered = click.get_current_context().meta[HINT] = Resumption(hint)
    yield offered


def carries_out(*, needs: Sequence[str] = LIBRARIES) -> Callable[[Callable[..., Outcome | None]], Callable[..., None]]:
    """Give a command ``--json``; print its `Outcome`, and say in one line what ended it.

    What it prints meanwhile goes to stdout, with ``--json`` to stderr. An outcome without text has been told already.

    Args:
        needs: libraries without which it is refused.
    """

    def decorate(command: Callable[..., Outcome | None]) -> Callable[..., None]:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of text.")
        @functools.wraps(command)
        def run(*args: Any, as_json: bool, **options: Any) -> None:
            context = click.get_current_context()
            program = shorten_program(str(context.find_root().info_name))
            outcome: Outcome | None = None
            code = 0
            interrupt_on_sigterm()
            silence_prefect()
            try:
                require_libraries(needs)
                with redirect_stdout(sys.stderr) if as_json else nullcontext():
                    outcome = command(*args, **options)
            except (click.ClickException, click.exceptions.Exit):
                raise
            except (Exception, KeyboardInterrupt) as error:
                code = refuse(program, error, context.meta.get(HINT, Resumption()).after(error))
            if outcome is not None:
                if as_json:
                    click.echo(json.dumps(outcome.document, indent=2, default=str))
                elif outcome.text:
                    click.echo(make_page(outcome.text))
                if outcome.refusal is not None:
                    code = refuse(program, outcome.refusal)
            # Not from within the handler: who catches it would see what was handled there.
            context.exit(code)

        return run

    return decorate


def run_program(module: str, command: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command as ``python -m flows.MODULE``; return its exit code.

    Args:
        module: of `flows`, as which it was typed.
        command: ``MODULE:NAME``, of the command in `flows.cli`.
        arguments: what was typed; None: what this process was started with.
    """
    place, _, name = command.partition(":")
    found: click.Command = getattr(importlib.import_module(f"flows.cli.{place}"), name)
    found.context_settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    with showing(None):
        return main(arguments, found, f"python -m flows.{module}")
