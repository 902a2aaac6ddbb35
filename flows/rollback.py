"""Point champion back at the version before: one command, nothing is measured.

mka rollback smollm2-135m-mka --because "answers in the wrong language"
"""

import sys
from functools import partial
from typing import Any

from flows.cli.console import run_program

if __name__ == "__main__":
    sys.exit(run_program("rollback", "rollback:rollback"))

from prefect import flow

from flows.promote import name_run, say_move
from mka.errors import PromotionError
from mka.terminal import Outcome
from tasks.machine.workplace import find_workplace
from tasks.refusing import name_refusals
from tasks.registry.assets import note_champion
from tasks.registry.index import write_index_page
from tasks.registry.promotion import find_previous, move_champion, name_person
from tasks.registry.tracking import CHAMPION, PREVIOUS, registry_address


@flow(name="rollback", flow_run_name=name_run, validate_parameters=False)
@name_refusals
def rollback(model: str, because: str, approver: str | None = None, registry: str | None = None) -> Any:
    """Exchange "champion" and "previous".

    Args:
        model: registered model.
        because: why, for the record.
        approver: who stands for it.
        registry: MLflow store; default: `MLFLOW_TRACKING_URI`, else that of the work folder.

    Returns:
        The move.

    Raises:
        PromotionError: if there is no previous champion, or somebody moved it meanwhile.
        RegistryError: if the registry cannot be reached.
    """
    place = find_workplace()
    place.prepare()
    uri = registry or registry_address(place)
    champion, previous = find_previous(uri, model)
    move = move_champion(previous, expected=champion, action="rollback", who=name_person(approver), why=because)
    if move is None:
        raise PromotionError(f"{model}: somebody moved champion away from version {champion} meanwhile; look again")
    note_champion(uri, move)
    say_move(move)
    write_index_page(place, uri)
    return move


def foresee_rollback(model: str, registry: str | None = None) -> Outcome:
    """Say which aliases a rollback would move; changes nothing.

    Raises:
        PromotionError: if there is no previous champion.
        RegistryError: if the registry cannot be reached.
    """
    champion, previous = find_previous(registry or registry_address(find_workplace()), model)
    moves = {CHAMPION: [champion, previous.version], PREVIOUS: [previous.version, champion]}
    lines = [
        f"{model}: champion would be version {previous.version}, before version {champion}",
        f"previous would be version {champion}; nothing would be measured",
        "dry run: nothing was moved",
    ]
    return Outcome({"model": model, "version": previous.version, "moves": moves}, "\n".join(lines))


main = partial(run_program, "rollback", "rollback:rollback")
