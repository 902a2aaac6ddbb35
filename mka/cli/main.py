"""The command `mka`: every stage on its own, or all of them in one call."""

import contextlib
import functools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

import mka
from mka.cli.bench import bench
from mka.cli.budget import budget
from mka.cli.chat import chat
from mka.cli.clean import clean
from mka.cli.compare import compare
from mka.cli.completion import completion
from mka.cli.compress import compress
from mka.cli.console import ARGUMENTS, examples
from mka.cli.evaluate import evaluate
from mka.cli.export import export
from mka.cli.frontier import frontier
from mka.cli.heal import heal
from mka.cli.init import init
from mka.cli.inspect import inspect
from mka.cli.merge import merge
from mka.cli.methods import methods
from mka.cli.models import find_work
from mka.cli.observe import observe
from mka.cli.plan import plan
from mka.cli.publish import publish
from mka.cli.recipe import recipe
from mka.cli.report import report
from mka.cli.score import score
from mka.cli.serve_check import serve_check
from mka.cli.sign import sign, verify
from mka.cli.tasks import tasks
from mka.cli.write import write
from mka.errors import MkaError
from mka.outside.printable import LONGEST, one_line
from mka.terminal import INTERRUPTED, SHARED_MACHINE, explain_unforeseen, interrupt_on_sigterm, was_interrupted


class Interrupted(MkaError):
    """The person at the keyboard wants it to end."""

    exit_code = INTERRUPTED
    longest = 8 * LONGEST  # the command that resumes is whole


# Where whatever is installed beside the library names its commands: the orchestrated half does.
COMMANDS = "mka.commands"


class Commands(click.Group):
    """A group that notes what was typed, and turns ^C into one line like any other refusal.

    Commands that the library does not have are entry points; they are imported by whoever uses one.
    """

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        """Keep the arguments, for reports."""
        typed_arguments = tuple(args)
        context = super().make_context(info_name, args, *rest, **extra)
        context.meta[ARGUMENTS] = typed_arguments
        return context

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of a run, then those of entry points."""
        return [*self.commands, *(name for name in find_installed() if name not in self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command, here or among the entry points.

        Raises:
            MkaError: if an entry point cannot be loaded.
        """
        entry = None if cmd_name in self.commands else find_installed().get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        try:
            command: click.Command = entry.load()
        except (ImportError, AttributeError) as error:
            raise MkaError(
                f"`mka {cmd_name}` cannot be loaded from {entry.value}: {error}; install the project again: "
                "pip install --force-reinstall --no-deps mka-compress, in a checkout pip install -e ."
            ) from None
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the library's commands, and below them those that are installed beside it."""
        own, beside = list(self.commands), self.list_commands(ctx)[len(self.commands) :]
        for title, names in (("Commands", own), ("Commands of production", beside)):
            room = formatter.width - 6 - max(map(len, names), default=0)
            rows = [(name, command.get_short_help_str(room)) for name, command in self.load_commands(ctx, names)]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def load_commands(self, ctx: click.Context, names: Sequence[str]) -> Iterator[tuple[str, click.Command]]:
        """Yield commands by name; one that cannot be loaded is left out, and says why when it is called."""
        for name in names:
            with contextlib.suppress(MkaError):
                if (command := self.get_command(ctx, name)) is not None:
                    yield name, command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        from mka.terminal import showing

        try:
            with showing(ctx.params["progress"]):
                return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if not was_interrupted(error):
                raise
            resume = shlex.join(["mka", *ctx.meta[ARGUMENTS]])
            raise Interrupted(
                "interrupted; no half-written output is left (mka compress, heal, bench and frontier go on where they "
                f"were; observe, score and plan keep what they wrote); resume: {resume}"
            ) from None


@functools.cache
def find_installed() -> dict[str, EntryPoint]:
    """Return the commands that are installed beside the library's: name -> entry point."""
    return {entry.name: entry for entry in entry_points(group=COMMANDS)}


@click.group(
    cls=Commands,
    invoke_without_command=True,
    epilog=examples(
        "mka inspect ./smollm2",
        "mka init ./smollm2 --output recipe.yaml",
        "mka compress --recipe recipe.yaml --output ./smollm2-25 --dry-run",
        "mka compress ./smollm2 --method mka --layers 24 --output ./smollm2-24",
        "mka observe ./smollm2 --output states.safetensors",
        "mka score ./smollm2 --states states.safetensors --output scores.json",
        "mka plan ./smollm2 --scores scores.json --layers 24 --output plan.json",
        "mka merge ./smollm2 --plan plan.json --output ./smollm2-24",
        "mka evaluate ./smollm2-24 --text data/prepared/heldout.jsonl",
        "mka compare ./smollm2 ./smollm2-24",
        'eval "$(mka completion bash)"     # the shell completes what is typed',
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--progress/--no-progress",
    default=None,
    help="On stderr: bars, or neither bars nor lines.  [default: bars in a terminal, and a line per stage]",
)
@click.version_option(mka.__version__, prog_name="mka")
@click.pass_context
def cli(context: click.Context, progress: bool | None) -> None:
    """Make a language model shallower: merge similar layers, quantize, and prove what was lost.

    Every command takes --json, and --help with an example. Exit codes: 0 done, 1 the gate failed the candidate,
    2 refused (one line on stderr says why), 3 the gate is undecided, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    inspect,
    init,
    recipe,
    compress,
    methods,
    tasks,
    write,
    observe,
    score,
    plan,
    merge,
    heal,
    evaluate,
    chat,
    compare,
    report,
    export,
    serve_check,
    sign,
    verify,
    publish,
    bench,
    budget,
    frontier,
    clean,
    completion,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None, command: click.Command = cli, name: str = "mka") -> int:
    """Run the command line; returns the exit code, after one line on stderr if it is not 0.

    Args:
        arguments: what was typed; None: what this process was started with.
        command: whose they are.
        name: what was typed before them.
    """
    # Libraries read these when they are imported; what a user set is kept.
    for variable, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        **SHARED_MACHINE,
    }.items():
        os.environ.setdefault(variable, value)
    interrupt_on_sigterm()

    def refuse(reason: str, code: int, longest: int = LONGEST) -> int:
        click.echo(f"{shorten_program(name)}: {one_line(reason, longest)}", err=True)
        return code

    try:
        code = command.main(None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except MkaError as error:
        return refuse(str(error), error.exit_code, error.longest)
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else name
        return refuse(f"{error.format_message()} See `{path} --help`.", error.exit_code)
    except click.Abort:
        return refuse("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return refuse(f"{place}{error.strerror or error}", 2)
    except MemoryError:
        return refuse("memory is used up; try --dtype bfloat16, fewer --samples or a smaller --batch-size", 2)
    except Exception as error:
        return refuse(explain_unforeseen(error, find_work()), 2)


def shorten_program(name: str) -> str:
    """Return what refusals begin with: of ``python -m flows.watch`` the last word."""
    return name.rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main())
