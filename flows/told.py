"""What a run tells whoever waits for it elsewhere: its stages and what came of it, as artifacts on its Prefect page."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from mka.outside.printable import hide_passwords, make_printable

# Keys of the artifacts; the table of results is called after its recipe (tasks/pages.py).
STAGES, OUTCOME, RESULTS = "stages", "outcome", "-results"


@dataclass(frozen=True)
class Told:
    """What a run has told so far.

    Attributes:
        stages: a row per stage that has ended: ``stage``, ``seconds``, ``reused`` and ``why``.
        results: rows of the table of results.
        outcome: verdict, model, version and where everything is; empty until the gate has spoken.
    """

    stages: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, str]] = field(default_factory=list)
    outcome: dict[str, str] = field(default_factory=dict)


def tell_stages(stages: Mapping[str, Mapping[str, Any]], artifact: UUID | None) -> UUID:
    """Put the stages that have ended on the run's page.

    Args:
        stages: stage -> seconds, whether it was reused, and why.
        artifact: the one made before, which is replaced.

    Returns:
        The artifact.
    """
    from prefect.artifacts import create_table_artifact
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactUpdate

    rows = [{"stage": name, **facts, "why": make_printable(str(facts["why"]))} for name, facts in stages.items()]
    if artifact is None:
        made: Any = create_table_artifact(rows, key=STAGES, description="Stages that have ended, in their order")
        return UUID(str(made))
    with get_client(sync_client=True) as client:
        client.update_artifact(artifact, ArtifactUpdate(data=json.dumps(rows)))
    return artifact


def tell_outcome(facts: Mapping[str, Any]) -> None:
    """Put what came of a run on its page: verdict, version, and where everything is.

    Args:
        facts: of `flows.run_log.Log`.
    """
    from prefect.artifacts import create_table_artifact

    registry = facts["registry"]
    named, version = registry["name"], registry["version"]
    told = {
        "verdict": facts["verdict"],
        "model": named,
        "version": version,
        "address": f"models:/{named}/{version}" if named else None,
        "promotion": facts["promotion"],
        "registry": hide_passwords(str(registry["tracking_uri"])),
        "mlflow_run": facts["mlflow_run_id"],
        "report": facts["report"],
    }
    rows = [{"what": name, "value": make_printable(str(value))} for name, value in told.items() if value is not None]
    create_table_artifact(rows, key=OUTCOME, description="What came of it")


def read_told(client: Any, flow_run_id: UUID) -> Told:
    """Read what a run has told.

    Args:
        client: Prefect's, synchronous.
        flow_run_id: the run.
    """
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    found = {str(artifact.key): artifact.data for artifact in client.read_artifacts(artifact_filter=mine)}

    def read_table(suffix: str) -> list[dict[str, Any]]:
        data: Any = next((data for key, data in found.items() if key.endswith(suffix)), [])
        table: list[dict[str, Any]] = json.loads(data) if isinstance(data, str) else data
        return table

    outcome = {row["what"]: row["value"] for row in read_table(OUTCOME)}
    return Told(read_table(STAGES), read_table(RESULTS), outcome)
