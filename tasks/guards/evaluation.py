"""The door in front of the gate: plausible figures, measured alike."""

from typing import TYPE_CHECKING, Any

from mka.evaluation.metrics import METRICS, find_metric
from mka.evaluation.scores import EvalReport
from mka.pipeline.evaluate import EVALUATE_CONTROL, open_report
from mka.pipeline.job import Job
from mka.pipeline.stage import Found
from tasks.guards.columns import expect_complete, expect_finite
from tasks.guards.guard import import_great_expectations

if TYPE_CHECKING:
    import pandas as pd


def evaluation_report_suite(minimum_rows: int = 2) -> list[Any]:
    """Expectations of `evaluation_report_table`: plausible figures, under equal n on all sides."""
    gxe = import_great_expectations().expectations
    from great_expectations.expectations.row_conditions import Column

    metric = Column("metric")
    ranges: dict[tuple[float | None, float | None, str], list[str]] = {}
    for row in METRICS.values():
        ranges.setdefault((row.least, row.most, row.plausible), []).append(row.name)
    plausible = [
        gxe.ExpectColumnValuesToBeBetween(
            column="value",
            **{key: end for key, end in (("min_value", least), ("max_value", most)) if end is not None},
            row_condition=metric.is_in(names) if len(names) > 1 else metric == names[0],
            description=said,
        )
        for (least, most, said), names in ranges.items()
    ]
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=minimum_rows),
        gxe.ExpectColumnDistinctValuesToContainSet(column="model", value_set=["base", "candidate"]),
        gxe.ExpectCompoundColumnsToBeUnique(column_list=["model", "name", "metric"]),
        expect_complete("value"),
        expect_finite("value"),
        *plausible,
        # One item has no standard error; its score is still a score.
        gxe.ExpectColumnValuesToNotBeNull(column="stderr", severity="warning"),
        expect_finite("stderr", 0),
        expect_complete("n"),
        gxe.ExpectColumnValuesToBeBetween(column="n", min_value=1),
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="n",
            column_B="n_of_other",
            ignore_row_if="neither",
            description="All models are measured on the same items.",
        ),
    ]


REPORT_COLUMNS = ("model", "name", "metric", "value", "stderr", "n", "n_of_other")


def evaluation_report_table(
    base: EvalReport, candidate: EvalReport, control: EvalReport | None = None
) -> "pd.DataFrame":
    """One row per score of all reports.

    Returns:
        Columns model ("base", "candidate", "control" if there is one of its own), name, metric, value, stderr, n,
        n_of_other (n of the same name and metric in the candidate's report, of the candidate in the base's; 0 if it is
        not there, n itself of what is not measured of the base).
    """
    import pandas as pd

    reports = {"base": base, "candidate": candidate} | ({"control": control} if control else {})
    counts = {
        model: {(score.name, score.metric): score.n for score in report.scores} for model, report in reports.items()
    }
    rows = []
    for model in reports:
        other = "base" if model == "candidate" else "candidate"
        for score in reports[model].scores:
            n_of_other = counts[other].get(
                (score.name, score.metric), 0 if find_metric(score.metric).of_base else score.n
            )
            rows.append((model, score.name, score.metric, score.value, score.stderr, score.n, n_of_other))
    return pd.DataFrame(rows, columns=list(REPORT_COLUMNS))


def in_front(job: Job, found: Found) -> tuple[str, Any, list[Any]]:
    """What the gate is to decide on."""
    control = open_report(found, "control") if EVALUATE_CONTROL.name in found else None
    table = evaluation_report_table(open_report(found, "base"), open_report(found, "candidate"), control)
    return "evaluation_report", table, evaluation_report_suite()
