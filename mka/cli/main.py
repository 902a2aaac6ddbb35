"""The command `mka`: every stage on its own, or all of them in one call."""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

import mka
from mka.cli.bench import bench
from mka.cli.budget import budget
from mka.cli.clean import clean
from mka.cli.compress import compress
from mka.cli.console import ARGUMENTS, examples
from mka.cli.evaluate import evaluate
from mka.cli.export import export
from mka.cli.frontier import frontier
from mka.cli.heal import heal
from mka.cli.merge import merge
from mka.cli.methods import methods
from mka.cli.models import find_work
from mka.cli.observe import observe
from mka.cli.plan import plan
from mka.cli.publish import publish
from mka.cli.report import report
from mka.cli.score import score
from mka.cli.serve_check import serve_check
from mka.cli.sign import sign, verify
from mka.cli.write import write
from mka.errors import MkaError
from mka.outside.printable import LONGEST, one_line
from mka.terminal import INTERRUPTED, SHARED_MACHINE, explain_unforeseen, interrupt_on_sigterm, was_interrupted


class Interrupted(MkaError):
    """The person at the keyboard wants it to end."""

    exit_code = INTERRUPTED
    longest = 8 * LONGEST  # the command that resumes is whole


class Commands(click.Group):
    """A group that notes what was typed, and turns ^C into one line like any other refusal."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        """Keep the arguments, for reports."""
        typed_arguments = tuple(args)
        context = super().make_context(info_name, args, *rest, **extra)
        context.meta[ARGUMENTS] = typed_arguments
        return context

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of the road."""
        return list(self.commands)

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


@click.group(
    cls=Commands,
    invoke_without_command=True,
    epilog=examples(
        "mka compress ./smollm2 --method mka --layers 24 --output ./smollm2-24",
        "mka observe ./smollm2 --output states.safetensors",
        "mka score ./smollm2 --states states.safetensors --output scores.json",
        "mka plan ./smollm2 --scores scores.json --layers 24 --output plan.json",
        "mka merge ./smollm2 --plan plan.json --output ./smollm2-24",
        "mka evaluate ./smollm2-24 --text data/prepared/heldout.jsonl",
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
    compress,
    methods,
    write,
    observe,
    score,
    plan,
    merge,
    heal,
    evaluate,
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
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, after one line on stderr if it is not 0."""
    # Libraries read these when they are imported; what a user set is kept.
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", **SHARED_MACHINE}.items():
        os.environ.setdefault(name, value)
    interrupt_on_sigterm()
    try:
        code = cli.main(None if arguments is None else list(arguments), prog_name="mka", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except MkaError as error:
        return _refuse(str(error), error.exit_code, error.longest)
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "mka"
        return _refuse(f"{error.format_message()} See `{path} --help`.", error.exit_code)
    except click.Abort:
        return _refuse("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{place}{error.strerror or error}", 2)
    except MemoryError:
        return _refuse("memory is used up; try --dtype bfloat16, fewer --samples or a smaller --batch-size", 2)
    except Exception as error:
        return _refuse(explain_unforeseen(error, find_work()), 2)


def _refuse(reason: str, code: int, longest: int = LONGEST) -> int:
    click.echo(f"mka: {one_line(reason, longest)}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
