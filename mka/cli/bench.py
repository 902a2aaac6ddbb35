"""`mka bench`: methods side by side, on the same model and the same data."""

import shlex
from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import find_work
from mka.cli.options import FILE, RECIPE, device_option
from mka.store.publishing import make_work
from mka.terminal import Outcome, align, quiet_libraries, say


@click.command(
    epilog=examples(
        "mka bench recipes/bench_smollm2.yaml --dry-run",
        "mka bench recipes/bench_smollm2.yaml --only shortgpt",
        "mka bench recipes/bench_smollm2.yaml --rows-in docs/comparing.md",
    )
)
@click.argument("recipe", type=RECIPE)
@click.option("--only", metavar="METHOD", help="Run the cells of one method, by name or label; show all stored ones.")
@click.option(
    "--rows-in",
    "page",
    type=FILE,
    metavar="FILE",
    help="Put the best rows between the markers of FILE, too.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and list the cells: stored, or about how long.")
@device_option
@reports
def bench(recipe: Path, only: str | None, page: Path | None, dry_run: bool) -> Outcome:
    """Compare methods as RECIPE says: methods × targets × alignment × healing × rounding.

    Every candidate is planned, merged, healed, rounded, measured from disk on the same windows as the base, and
    deleted; plans and figures stay in the work folder, so that the same command goes on where it was killed. Where
    something is rounded, the page shows quality against bytes. Exit code 1 if a cell failed for another reason than
    its method's limits.
    """
    from mka.bench.prepare import prepare
    from mka.bench.publish import publish_results
    from mka.bench.recipe import load_bench
    from mka.bench.run import foresee_bench, run_bench

    loaded = load_bench(recipe)
    if not dry_run:
        make_work(find_work())
    with quiet_libraries():
        prepared = prepare(loaded, find_work(), write=not dry_run, command=shlex.join(["mka", "bench", str(recipe)]))
        if dry_run:
            return show_foresight(foresee_bench(prepared, only))
        results = run_bench(prepared, only=only, say=say)
        return publish_results(results, page)


def show_foresight(cells: list[dict[str, Any]]) -> Outcome:
    """Say what a dry run found."""

    def tell(cell: dict[str, Any]) -> str:
        return "stored" if cell["stored"] else "not reached" if cell["refusal"] else f"about {cell['seconds']:,.0f} s"

    rows = [[cell["cell"], cell["layers"], tell(cell)] for cell in cells]
    refused = [f"{cell['cell']} at {cell['layers']}: {cell['refusal']}" for cell in cells if cell["refusal"]]
    todo = [cell["seconds"] for cell in cells if not cell["stored"] and not cell["refusal"]]
    total = f"{len(todo)} of {len(cells)} to do, about {sum(todo) / 60:,.1f} minutes; searches come on top at first"
    document = {"cells": cells, "to_do": len(todo), "seconds": sum(todo)}
    table = align(rows, ["cell", "layers", "state"], "lrr")
    return Outcome(document, "\n".join([table, "", *refused, total, "dry run: nothing was run"]))
