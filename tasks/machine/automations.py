"""Automations of a Prefect server: those of automations.yaml, and the block that one of them sends by.

python -m tasks.machine.automations      # on the server that PREFECT_API_URL names; `make up` does it by itself
"""

from pathlib import Path
from typing import Any

from mka.sections import parse_yaml

FILE = "automations.yaml"
# A webhook that nobody listens to, until an operator puts in another.
NOTIFY, NOWHERE = "mka-notify", "http://127.0.0.1:9/"


def make_automations(client: Any, root: Path) -> None:
    """Make what is missing of them; what an operator has changed or switched off stays as it is.

    Args:
        client: of the Prefect server.
        root: of the project.
    """
    from prefect.events.schemas.automations import AutomationCore

    for asked in parse_yaml((root / FILE).read_text(encoding="utf-8"))["automations"]:
        if client.read_automations_by_name(asked["name"]):
            continue
        for action in asked["actions"]:
            if action.get("block_document_id") == NOTIFY:
                action["block_document_id"] = _find_notify(client)
        client.create_automation(AutomationCore.model_validate(asked))


def _find_notify(client: Any) -> Any:
    """Return the id of the block, which is made where it is missing."""
    from prefect.client.schemas.actions import BlockDocumentCreate
    from prefect.exceptions import ObjectNotFound

    slug = "custom-webhook"
    try:
        return client.read_block_document_by_name(NOTIFY, slug).id
    except ObjectNotFound:
        kind = client.read_block_type_by_slug(slug)
        schema = client.get_most_recent_block_schema_for_block_type(kind.id)
        body = {"text": "{{subject}}: {{body}}"}
        made = BlockDocumentCreate(
            name=NOTIFY,
            data={"name": NOTIFY, "url": NOWHERE, "json_data": body},
            block_schema_id=schema.id,
            block_type_id=kind.id,
        )
        return client.create_block_document(made).id


if __name__ == "__main__":
    from prefect.client.orchestration import get_client

    from tasks.machine.workplace import find_workplace

    with get_client(sync_client=True) as prefect:
        make_automations(prefect, find_workplace().root)
