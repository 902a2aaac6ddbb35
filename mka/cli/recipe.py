"""`mka recipe`: a recipe with all its defaults, and the schema that editors check recipes by."""

import json
from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.options import RECIPE, read_settings
from mka.terminal import Outcome


@click.command(
    epilog=examples(
        "mka recipe --show recipe.yaml",
        "mka recipe --show recipe.yaml --set target.layers=24 --set quantize.scheme=int4",
        "mka recipe --schema > recipe.schema.json",
    )
)
@click.option("--show", "file", type=RECIPE, metavar="RECIPE", help="Print this recipe with every default filled in.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    callback=read_settings,
    help="With --show: a dotted key of the recipe and its value, e.g. target.layers=24; may be repeated.",
)
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes.")
@reports
def recipe(file: Path | None, changes: dict[str, Any], schema: bool) -> Outcome:
    """Show a recipe as it will be understood, or the schema of all recipes.

    --show refuses what a run refuses when it reads RECIPE; what it prints is a recipe again, and a comment names the
    default of every value that is another. Beside a schema, an editor completes and checks a recipe whose first line is
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    if schema == (file is not None):
        raise click.UsageError("Give one of --show RECIPE and --schema.")
    if schema and changes:
        raise click.UsageError("--set goes with --show.")
    from mka.pipeline.recipes import load_recipe
    from mka.pipeline.spelling import fill_recipe, find_changes, make_schema, spell_recipe

    if file is None:
        document = make_schema()
        return Outcome(document, json.dumps(document, indent=2))
    loaded = load_recipe(file, changes)
    filled, changed = fill_recipe(loaded), find_changes(loaded)
    behind = {key: f"default: {json.dumps(default, ensure_ascii=False)}" for key, default in changed.items()}
    return Outcome({"recipe": filled, "defaults_of_changed": changed}, spell_recipe(filled, behind=behind).rstrip("\n"))
