"""`mka run`: one recompression, here."""

from pathlib import Path
from typing import Any

import click

from flows.cli.console import carries_out, resumable
from flows.cli.options import set_option
from flows.command_line import prepare_flow
from mka.cli.console import examples
from mka.cli.options import FILE
from mka.errors import GateRefused
from mka.terminal import Outcome


@click.command(
    epilog=examples(
        "mka run recipes/smollm2_135m.yaml --dry-run",
        "mka run recipes/smollm2_135m.yaml --set target.layers=26",
    )
)
@click.argument("recipe", type=FILE)
@set_option
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be made and what is stored.")
@carries_out()
def run(recipe: Path, overrides: dict[str, Any], dry_run: bool) -> Outcome:
    """Recompress a model as RECIPE says: observe, merge, quantize, evaluate, gate, register, promote.

    The flow runs here, on the Prefect server that PREFECT_API_URL names or on one of its own. Every stage is stored
    and found again: killed, the same command goes on where it was. last_run.json in the work folder has the facts.
    Exit codes: 0 done, 1 the gate failed the candidate, 2 refused, 3 the gate is undecided, 130 interrupted.
    """
    from flows.recompress import describe_command, load_recipe, recompress
    from mka.report.verdict import refuse_verdict
    from tasks.machine.workplace import find_workplace

    path, place = recipe.resolve(), find_workplace()
    again = describe_command(place, str(path), overrides)
    if dry_run:
        from flows.foresee import foresee_recompression

        return foresee_recompression(str(path), overrides)
    with resumable(f"finished stages are kept; resume: {again}") as resumption:
        load_recipe(path, overrides)
        prepare_flow()
        resumption.begun = True
        try:
            facts = recompress(str(path), overrides)
        except GateRefused as error:
            return Outcome(read_facts(place.last_run), "", error)
        return Outcome(facts, "", refuse_verdict(facts["gate"], facts["report"]))


def read_facts(file: Path) -> Any:
    """Return what the run that ended a moment ago left, which a refused one does not return."""
    from mka.outside.reading import read_json

    return read_json(file)
