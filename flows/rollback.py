"""Point champion back at the version before: one command, nothing is measured.

python -m flows.rollback smollm2-135m-mka --because "answers in the wrong language"
"""

import sys
from collections.abc import Sequence
from typing import Any

from flows.command_line import run_command, silence_prefect

if __name__ == "__main__":
    silence_prefect()

from prefect import flow

from flows.promote import add_move_arguments, name_run, say_move
from mka.errors import PromotionError
from tasks.machine.workplace import find_workplace
from tasks.refusing import name_refusals
from tasks.registry.assets import note_champion
from tasks.registry.index import write_index_page
from tasks.registry.promotion import find_previous, move_champion, name_person
from tasks.registry.tracking import registry_address


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


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the command line."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m flows.rollback",
        description="Make the previous champion champion again. Nothing is measured; running it twice undoes it.",
        epilog='example: python -m flows.rollback smollm2-135m-mka --because "answers in the wrong language"',
    )
    add_move_arguments(parser)
    return vars(parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the flow on this machine."""
    given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return run_command("rollback", lambda: rollback(**given), registry=given["registry"])


if __name__ == "__main__":
    sys.exit(main())
