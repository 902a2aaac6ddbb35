"""Have the base models changed? If so, start one recompression for each recipe concerned, however often this runs.

mka watch recipes/smollm2_135m.yaml --dry-run
"""

import sys
from functools import partial
from typing import Any

from flows.cli.console import run_program
from flows.command_line import say
from flows.run_log import name_by_time

if __name__ == "__main__":
    sys.exit(run_program("watch", "watch:watch"))

from prefect import flow
from prefect.artifacts import create_table_artifact

from mka.errors import MkaError, ServerError, WatchError
from tasks.machine.deployments import RECOMPRESS
from tasks.machine.slots import is_on_server
from tasks.machine.workplace import Workplace, find_workplace
from tasks.refusing import REFUSED
from tasks.watching import RETRIES, compare_base_model, start_recompression

# States of a run that this flow does not start again.
ENDED = ("Failed", "Crashed", "Cancelled", REFUSED)


@flow(name="watch-base-models", flow_run_name=lambda: name_by_time("watch"), validate_parameters=False)
def watch_base_models(
    recipes: list[str],
    deployment: str = RECOMPRESS,
    dry_run: bool = False,
    initial: bool = False,
    retries: int = RETRIES,
) -> list[dict[str, Any]]:
    """Compare each recipe's base model with the one its champion was made from; start what is due.

    A run is started once per base revision and recipe: the Prefect server refuses a second one with the same key, so
    watchers may overlap. One that failed or crashed is started again by the next watch, a few times.

    Args:
        recipes: paths of recipes, relative to the project's root or absolute.
        deployment: what to start, ``flow/deployment``.
        dry_run: only compare.
        initial: start the first recompression too, of a model of which nothing is registered yet.
        retries: how often at most a recompression that failed or crashed is started again.

    Returns:
        One row per recipe.

    Raises:
        WatchError: after all recipes were looked at, if any could not be, or its recompression not be started.
        ServerError: if something is due and there is no Prefect server to start it.
    """
    place = find_workplace()
    place.prepare()
    rows, failures = [], []
    for recipe in recipes:
        try:
            rows.append(look_at(place, recipe, deployment, dry_run=dry_run, initial=initial, retries=retries))
        except ServerError:
            raise
        except MkaError as error:
            failures.append(f"{recipe}: {error}")
            say(f"{recipe}: {error}")
    if rows:
        create_table_artifact(rows, key="base-models", description="Base models, and what was done about each")
    if failures:
        raise WatchError(f"{len(failures)} of {len(recipes)} recipes could not be looked at: {'; '.join(failures)}")
    return rows


def look_at(
    place: Workplace, recipe: str, deployment: str, *, dry_run: bool, initial: bool, retries: int
) -> dict[str, Any]:
    """Look at one recipe's base, start what is due, say so; return its row."""
    change = compare_base_model(place, recipe)
    done = "nothing to do"
    if change.is_first and not initial:
        done = "--initial (deployment: initial=true) starts the first"
    elif change.is_due and dry_run:
        done = f"would start {deployment}"
    elif change.is_due:
        if not is_on_server():
            raise ServerError(
                f"{change.describe()}, and no Prefect server to start its recompression on: set PREFECT_API_URL "
                f"(`mka up` starts one), or `mka run {recipe}`"
            )
        run = start_recompression(change, deployment, retries)
        again = f", retry {run.attempt} of {retries}" if run.attempt else ""
        done = (
            f"started {run.run}{again}" if run.is_new else f"{run.run} was started for it before ({run.state}{again})"
        )
        if not run.is_new and run.state in ENDED:
            done += f"; again by hand: prefect deployment run {deployment} --param recipe={recipe}"
    say(f"{change.describe()}; {done}")
    return {"recipe": recipe, "base model": change.base_model, "now": change.now, "known": change.known, "done": done}


main = partial(run_program, "watch", "watch:watch")
