"""Have the base models changed? If so, start one recompression for each recipe concerned, however often this runs.

mka watch recipes/smollm2_135m.yaml --dry-run
"""

import sys
from functools import partial
from typing import Any

from flows.cli.console import run_program
from flows.command_line import say

if __name__ == "__main__":
    sys.exit(run_program("watch", "watch:watch"))

from prefect import flow
from prefect.artifacts import create_table_artifact

from mka.errors import MkaError, ServerError, WatchError
from tasks.machine.deployments import RECOMPRESS
from tasks.machine.slots import is_on_server
from tasks.machine.workplace import Workplace, find_workplace
from tasks.watching import compare_base_model, start_recompression


@flow(name="watch-base-models", validate_parameters=False)
def watch_base_models(recipes: list[str], deployment: str = RECOMPRESS, dry_run: bool = False) -> list[dict[str, Any]]:
    """Compare each recipe's base model with the one its champion was made from; start what is due.

    A run is started once per base revision and recipe: the Prefect server refuses a second one with the same key, so
    watchers may overlap. A base whose recompression failed is not tried again by itself; the line says how to.

    Args:
        recipes: paths of recipes, relative to the project's root or absolute.
        deployment: what to start, ``flow/deployment``.
        dry_run: only compare.

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
            rows.append(look_at(place, recipe, deployment, dry_run))
        except ServerError:
            raise
        except MkaError as error:
            failures.append(f"{recipe}: {error}")
            say(f"{recipe}: {error}")
    if rows:
        create_table_artifact(rows, key="base-models", description="Base models and what was done about them")
    if failures:
        raise WatchError(f"{len(failures)} of {len(recipes)} recipes could not be looked at: {'; '.join(failures)}")
    return rows


def look_at(place: Workplace, recipe: str, deployment: str, dry_run: bool) -> dict[str, Any]:
    """Look at one recipe's base, start what is due, say so; return its row."""
    change = compare_base_model(place, recipe)
    done = "nothing to do"
    if change.is_due and dry_run:
        done = f"would start {deployment}"
    elif change.is_due:
        if not is_on_server():
            raise ServerError(
                f"{change.describe()}, and no Prefect server to start its recompression on: set PREFECT_API_URL "
                f"(`mka up` starts one), or `mka run {recipe}`"
            )
        run = start_recompression(change, deployment)
        done = f"started {run.run}" if run.is_new else f"{run.run} was started for it before ({run.state})"
        if not run.is_new and run.state in ("Failed", "Crashed", "Cancelled"):
            done += f"; again by hand: prefect deployment run {deployment} --param recipe={recipe}"
    say(f"{change.describe()}; {done}")
    return {"recipe": recipe, "base model": change.base_model, "now": change.now, "known": change.known, "done": done}


main = partial(run_program, "watch", "watch:watch")
