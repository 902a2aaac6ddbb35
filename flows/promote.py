"""Make a registered version champion: today's gate, today's base, and the champion there is are asked first.

mka promote smollm2-135m-mka --because "evidence read"
"""

import sys
from functools import partial
from typing import Any

from flows.cli.console import run_program
from flows.command_line import say
from flows.run_log import name_by_time

if __name__ == "__main__":
    sys.exit(run_program("promote", "promote:promote"))

from prefect import flow
from prefect.runtime import flow_run

from mka.errors import PromotionError
from mka.methods import resolve_method
from mka.pipeline.job import open_job
from mka.recipe import Recipe
from mka.terminal import Outcome
from tasks.base_model import fetch_base_model
from tasks.calibration import open_inputs
from tasks.machine.slots import compute_slot, hold_slot
from tasks.machine.workplace import find_workplace
from tasks.refusing import name_refusals
from tasks.registry.assets import note_champion
from tasks.registry.challenge import promote_measured, read_recipe, refuse_stale, refuse_unapproved, require_pass
from tasks.registry.index import write_index_page
from tasks.registry.promotion import (
    Move,
    RegisteredVersion,
    find_candidate,
    name_person,
    read_aliases,
    read_version,
)
from tasks.registry.signature import require_signature
from tasks.registry.tracking import CHAMPION, PREVIOUS, registry_address
from tasks.stages import Run
from tasks.tables import Tables, read_tables


def name_run() -> str:
    """Name a run after the move and the model, e.g. ``promote-smollm2-135m-mka-20260101-120000``."""
    return name_by_time(f"{flow_run.flow_name} {flow_run.parameters.get('model', '')}")


@flow(name="promote", flow_run_name=name_run, validate_parameters=False)
@name_refusals
def promote(
    model: str,
    because: str,
    version: str | None = None,
    approver: str | None = None,
    compare: bool = True,
    registry: str | None = None,
) -> Any:
    """Promote a version to champion; the champion before it becomes "previous".

    The gate is decided anew on the tables of today, from stored measurements where base, candidate and tables are what
    they were, and the version is held against the current champion on the same windows and items.

    Args:
        model: registered model.
        because: why, for the record.
        version: its version; default: the one "candidate" points at.
        approver: who stands for it, where the recipe wants a name.
        compare: hold it against the champion.
        registry: MLflow store; default: `MLFLOW_TRACKING_URI`, else that of the work folder.

    Returns:
        The move.

    Raises:
        PromotionError: if it is stale, not approved, not signed where its recipe asks for that, does not pass the gate
            or is not as good as the champion.
        MkaError: if anything it needs cannot be had.
    """
    place = find_workplace()
    place.prepare()
    uri = registry or registry_address(place)
    chosen, recipe = choose_version(uri, model, version)
    refuse_unapproved(recipe, approver)
    refuse_stale(place, recipe, chosen)
    require_signature(place, recipe, chosen)
    base = fetch_base_model(place, recipe)
    versions, tables = read_tables(place, recipe)
    command = f"mka promote {model} --version {chosen.version}"
    job = open_job(
        recipe,
        resolve_method(recipe.method),
        base.checkpoint,
        base.revision,
        open_inputs(recipe, Tables(versions, tables, None), {}),
        command=command,
    )
    run = Run(place, job, str(flow_run.name), versions, tables)
    with hold_slot(compute_slot()):
        measured = require_pass(run, chosen)
        move = promote_measured(run, chosen, measured, who=name_person(approver), why=because, compare=compare)
    note_champion(uri, move)
    say_move(move)
    write_index_page(place, uri)
    return move


def choose_version(uri: str, model: str, version: str | None) -> tuple[RegisteredVersion, Recipe]:
    """Return the version that was named, else the one "candidate" points at, with the recipe it was made by.

    Raises:
        PromotionError: if there is none, or it has no recipe.
        RegistryError: if the registry cannot be reached.
    """
    chosen = read_version(uri, model, str(version)) if version else find_candidate(uri, model)
    return chosen, read_recipe(chosen)


def say_move(move: Move) -> None:
    """Tell the terminal and the run's log."""
    before = f"version {move.old}" if move.old else "none"
    say(f"{move.model}: champion is version {move.new}, before {before}; {move.action} by {move.who}: {move.why}")


def foresee_promotion(
    model: str,
    version: str | None = None,
    approver: str | None = None,
    compare: bool = True,
    registry: str | None = None,
) -> Outcome:
    """Say which aliases a promotion would move and what evidence it would ask for; measures and changes nothing.

    What can be refused without measuring is refused; the arguments are those of `promote`.

    Raises:
        PromotionError: if it is champion already, stale, not approved, or not signed where its recipe asks for that.
        MkaError: if anything that needs cannot be had.
    """
    place = find_workplace()
    place.prepare()
    uri = registry or registry_address(place)
    chosen, recipe = choose_version(uri, model, version)
    aliases = read_aliases(uri, model)
    current = aliases.get(CHAMPION)
    if current == chosen.version:
        raise PromotionError(f"{chosen.label} is champion already")
    refuse_unapproved(recipe, approver)
    refuse_stale.fn(place, recipe, chosen)
    require_signature(place, recipe, chosen)
    moves = {CHAMPION: [current, chosen.version]}
    if current is not None:
        moves[PREVIOUS] = [aliases.get(PREVIOUS), current]
    asked = ["the gate of its recipe passes it today, on the files that the registry holds"]
    if current is not None and compare:
        asked.append(f"it is as good as version {current} on the same windows and items")
    lines = [
        f"{model}: champion would be version {chosen.version}, before {f'version {current}' if current else 'none'}",
        *([f"previous would be version {current}"] if current else []),
        f"the base is unchanged; approver {approver or 'none asked for'}; "
        f"signature {'holds' if recipe.registry.signature else 'none asked for'}",
        *(f"would be asked: {line}" for line in asked),
        "dry run: nothing was measured or moved",
    ]
    return Outcome({"model": model, "version": chosen.version, "moves": moves, "asked": asked}, "\n".join(lines))


main = partial(run_program, "promote", "promote:promote")
