"""`mka watch`: have base models changed?"""

from pathlib import Path

import click

from flows.cli.console import carries_out
from flows.command_line import prepare_flow
from mka.cli.console import examples
from mka.terminal import Outcome

DEPLOYMENT = "recompress/default"


@click.command(epilog=examples("mka watch recipes/smollm2_135m.yaml --dry-run"))
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--deployment", default=DEPLOYMENT, show_default=True, metavar="FLOW/NAME", help="What to start.")
@click.option("--dry-run", is_flag=True, help="Only say what has changed.")
@carries_out()
def watch(recipes: tuple[str, ...], deployment: str, dry_run: bool) -> Outcome:
    """Compare the base model of each RECIPE with the one its champion was made from; start what is due.

    A recompression is started once per base revision and recipe, however often and wherever this runs, on the Prefect
    server that PREFECT_API_URL names.
    """
    from flows.watch import watch_base_models
    from tasks.machine.workplace import find_workplace

    place = find_workplace()
    named = [str(place.relative(Path(recipe).resolve())) for recipe in recipes]
    prepare_flow()
    return Outcome({"recipes": watch_base_models(named, deployment, dry_run)}, "")
