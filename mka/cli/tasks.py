"""`mka tasks`: what there is to measure a model on, by name."""

from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.options import Command, pick, recipe_options
from mka.errors import RecipeError, nearest
from mka.terminal import Outcome, align

# Rows on a terminal; --json has all.
MOST = 60


@click.command(
    cls=Command, epilog=examples("mka tasks 'arc*'", "mka tasks gsm8k --json", "mka tasks --include-path ./my-tasks")
)
@click.argument("pattern", required=False, default="*")
@recipe_options("evaluation.tasks_folder", "evaluation.include_path")
@click.option("--runs", is_flag=True, help="Only those that can be run here, with their data on this machine.")
@reports
def tasks(pattern: str, runs: bool, asked: dict[str, Any]) -> Outcome:
    """List tasks by name: how they are asked, on which data set, and whether they can be run here.

    PATTERN is a part of the name, or all of it with * and ? in it. The first use with a version of lm-eval looks
    through its definitions, some 14,000 files, which takes seconds.
    """
    from mka.cli.options import default_of
    from mka.evaluation.catalog import Catalog
    from mka.evaluation.listing import list_all_names, list_names

    given = pick(asked, "evaluation")
    folder: Path | None = given.get("tasks_folder", default_of("evaluation.tasks_folder"))
    catalog = Catalog(folder, given.get("include_path"))
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = list_names(catalog, wanted)
    if not found:
        raise RecipeError(f"no task is called {pattern!r}{nearest(pattern, list_all_names(catalog), 3)}")
    found = [row for row in found if row["runs"] == "yes" or not runs]
    shown = [[row["name"], row["kind"], row["output_type"], row["data"], row["runs"]] for row in found[:MOST]]
    text = align(shown, ["task", "kind", "asked by", "data set", "can be run here"])
    if len(found) > MOST:
        text += f"\n\n{len(found)} in all; narrow the pattern, or --json lists every one"
    return Outcome({"tasks": found}, text)
