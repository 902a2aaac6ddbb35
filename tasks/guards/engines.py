"""The door behind serving: every engine that was asked has a verdict, and figures that are possible."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.pipeline.job import Job
from tasks.guards.columns import expect_complete, expect_finite
from tasks.guards.guard import import_great_expectations

if TYPE_CHECKING:
    import pandas as pd


def engines_suite(asked: int) -> list[Any]:
    """Expectations of `engines_table`, of so many engines."""
    gxe = import_great_expectations().expectations
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=asked, description="Every engine that was asked is there."),
        expect_complete("engine"),
        gxe.ExpectColumnUniqueValueCountToBeBetween(column="engine", min_value=asked, max_value=asked),
        expect_complete("verdict"),
        gxe.ExpectColumnValuesToBeInSet(
            column="verdict", value_set=["pass", "fault"], description="What could not be told is not kept."
        ),
        expect_finite("ratio", 0, or_equal=False, description="A speed beside another is above 0 and finite."),
        gxe.ExpectColumnValuesToBeBetween(
            column="figures", min_value=1, description="What an engine serves was timed beside the base."
        ),
    ]


def engines_table(facts: Mapping[str, Mapping[str, Any]]) -> "pd.DataFrame":
    """One row per engine, figure and number of prompts at once; one row for an engine without figures.

    Returns:
        Columns engine, verdict, figure, at_once, ratio (candidate / base; null without figures), figures (how many the
        engine has; null where it does not serve the candidate).
    """
    import pandas as pd

    rows = []
    for name, found in facts.items():
        timed = [(figure, at, ratio) for figure, ratios in found["ratios"].items() for at, ratio in ratios.items()]
        count = len(timed) if found["loads"] else None
        rows += [(name, found["verdict"], *row, count) for row in timed or [(None, None, None)]]
    return pd.DataFrame(rows, columns=["engine", "verdict", "figure", "at_once", "ratio", "figures"])


def behind(job: Job, folder: Path, facts: Mapping[str, Any]) -> tuple[str, Any, list[Any]]:
    """What engines made of base and candidate."""
    return "engines", engines_table(facts), engines_suite(len(job.recipe.engines))
