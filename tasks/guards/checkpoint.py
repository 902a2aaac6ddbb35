"""The door behind a written checkpoint: complete, finite, consistent, and generating the same cached."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.pipeline.job import Job
from tasks.guards.guard import import_great_expectations

if TYPE_CHECKING:
    import pandas as pd


def checkpoint_suite(layers: int) -> list[Any]:
    """Expectations of `checkpoint_table`: complete, finite, consistent, and generating the same cached."""
    gxe = import_great_expectations().expectations
    zeros = {
        "missing_keys": "The folder holds every tensor the config asks for.",
        "unexpected_keys": "The folder holds no tensor the config does not know.",
        "nonfinite_tensors": "No weight is NaN or infinite.",
        "generation_mismatches": "Generation with a cache equals generation without.",
    }
    return [
        gxe.ExpectTableRowCountToEqual(value=1),
        gxe.ExpectColumnValuesToBeInSet(column="layers", value_set=[layers]),
        gxe.ExpectColumnPairValuesToBeEqual(column_A="layers", column_B="config_layers", ignore_row_if="neither"),
        *[
            gxe.ExpectColumnValuesToBeBetween(column=column, min_value=0, max_value=0, description=description)
            for column, description in zeros.items()
        ],
        gxe.ExpectColumnValuesToBeBetween(column="parameters", min_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="bytes", min_value=1),
    ]


CHECKPOINT_COLUMNS = (
    "layers",
    "config_layers",
    "missing_keys",
    "unexpected_keys",
    "nonfinite_tensors",
    "parameters",
    "bytes",
    "generation_mismatches",
)


def checkpoint_table(facts: Mapping[str, Any]) -> "pd.DataFrame":
    """Lay the facts of one checkpoint out in one row.

    Args:
        facts: counts by the names in `CHECKPOINT_COLUMNS`; a collection of names counts as its length. A fact that is
            absent or None has no column, so that its expectations fail instead of passing on nothing.
    """
    import pandas as pd

    given = {name: facts[name] for name in CHECKPOINT_COLUMNS if facts.get(name) is not None}
    counts = {name: fact if isinstance(fact, int) else len(fact) for name, fact in given.items()}
    return pd.DataFrame([counts])


def behind(job: Job, folder: Path, facts: Mapping[str, Any]) -> tuple[str, Any, list[Any]]:
    """What a stranger's loader found in a model that was written."""
    return "checkpoint", checkpoint_table(facts["loaded"]), checkpoint_suite(job.aim.layers_out)


def behind_control(job: Job, folder: Path, facts: Mapping[str, Any]) -> tuple[str, Any, list[Any]]:
    """The same of a model that keeps every layer."""
    return "checkpoint", checkpoint_table(facts["loaded"]), checkpoint_suite(job.base.layers)
