"""What a recompression would do and what of it is stored; nothing is measured, made or registered."""

from pathlib import Path
from typing import Any

from mka.cli.compress import show_foresight
from mka.pipeline.job import prepare
from mka.pipeline.pipeline import foresee
from mka.pipeline.recipes import load_recipe
from mka.pipeline.reuse import find_stored
from mka.recipe import BASE_TEXT, Recipe
from mka.terminal import Outcome, align, quiet_libraries
from tasks.base_model import BaseModel, fetch_base_model
from tasks.machine.workplace import find_workplace
from tasks.registry.record import reach_registry
from tasks.registry.tracking import find_database, registry_address
from tasks.tables import Tables, read_tables


def foresee_recompression(recipe: str, overrides: dict[str, Any] | None = None) -> Outcome:
    """Check a recipe as its run would, and say what that would make and reuse.

    The base is fetched and the tables are copied aside, as the run would have them; a base that would write its own
    text does not.

    Args:
        recipe: path of the recipe, relative to the project's root or absolute.
        overrides: dotted recipe keys and their values.

    Raises:
        MkaError: whatever the run would refuse before it computes.
    """
    from flows.recompress import require_judged

    place = find_workplace()
    place.prepare()
    loaded = load_recipe(place.path(Path(recipe)), overrides)
    database = find_database(address := registry_address(place, loaded))
    if database is None or database.exists():  # reaching one that is not there would make it
        reach_registry.fn(place, loaded)
    base = fetch_base_model.fn(place, loaded)
    versions, copies = read_tables.fn(place, loaded)
    located = locate(loaded, base, Tables(versions, copies, None))
    with quiet_libraries(loaded.quantize.scheme != "off"):
        job = prepare(located, place.work, write=False)
    require_judged(job)
    facts = foresee(job, place.stages)
    del facts["files"]  # of a folder that `mka compress` would publish
    stages = {name: product is not None for name, product in find_stored(job, place.stages).items()}
    facts |= {"stored": stages, "registry": address, "registered_name": loaded.registered_name}
    rows = [[name, "stored" if there else "to be made"] for name, there in stages.items()]
    lines = [
        show_foresight(job, facts),
        align(rows, ["stage", ""]),
        f"would be registered as {loaded.registered_name} in {address}, unless the gate fails it; "
        + describe_promotion(loaded),
        "dry run: nothing was computed or registered",
    ]
    return Outcome(facts, "\n\n".join(lines))


def describe_promotion(recipe: Recipe) -> str:
    """Say what a recipe leaves to whom."""
    settings = recipe.registry
    if settings.approvers:
        return f"promotion waits for {' or '.join(settings.approvers)}"
    if settings.signature is not None:
        return "promotion waits for a signature"
    return "promotion waits for a person" if settings.promote == "manual" else "promoted if the gate passes it"


def locate(recipe: Recipe, base: BaseModel, tables: Tables) -> Recipe:
    """Return a recipe whose base and tables are named as they lie here."""

    def find(path: Path | None) -> Path | None:
        return path if path is None or path == BASE_TEXT else tables.find(path)

    changed: dict[str, Any] = {}
    for name, used in (
        ("calibration", True),
        ("alignment", recipe.alignment.enabled),
        ("heal", recipe.heal.mode != "off"),
    ):
        section = getattr(recipe, name)
        if used:
            changed[name] = section.model_copy(update={"path": find(section.path)})
    evaluation = recipe.evaluation
    folder = find(evaluation.tasks_folder) if evaluation.tasks else None
    named = {"text": find(evaluation.text), "overlap_index": find(evaluation.overlap_index), "tasks_folder": folder}
    changed["evaluation"] = evaluation.model_copy(update=named)
    if recipe.model.registered is not None or recipe.model.folder is not None:
        there = {"registered": None, "folder": base.checkpoint.path}
        changed["model"] = recipe.model.model_copy(update=there)
    return recipe.model_copy(update=changed)
