"""`mka sweep`: a comparison, cell by cell as tasks."""

import shlex
from pathlib import Path

import click

from flows.cli.console import carries_out, resumable
from flows.command_line import prepare_flow
from mka.cli.console import examples
from mka.cli.options import FILE
from mka.terminal import Outcome


@click.command(epilog=examples("mka sweep recipes/bench_smollm2.yaml --workers 2"))
@click.argument("recipe", type=FILE)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cells at a time, threads or processes.  [default: the recipe's fan_out]",
)
@carries_out()
def sweep(recipe: Path, workers: int | None) -> Outcome:
    """Compare methods side by side, cells as tasks; what `mka bench` stored is not run again.

    Where cells run is the fan_out of RECIPE: threads of this process, or worker processes of Dask, here or elsewhere.
    `mka bench --dry-run` says what would be run.
    """
    from flows import sweep as flow
    from tasks.sweep.fan_out import choose_fan_out

    with resumable(f"finished cells are kept; resume: mka sweep {shlex.quote(str(recipe))}") as resumption:
        loaded = flow.load_bench(recipe.resolve())
        prepare_flow()
        choose_fan_out(loaded.fan_out, workers)
        resumption.begun = True
        outcome: Outcome = flow.sweep(str(recipe.resolve()), workers)
    return outcome
