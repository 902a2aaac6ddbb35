"""What must hold at the door of each stage: one function per table of `tasks.tables`, each a list of expectations.

Null values pass every expectation of Great Expectations but the one that forbids them, and so does an empty table but
for its row count. Hence each suite says both, and every column that decides anything is also "not null".
"""

import sys
from collections.abc import Sequence
from typing import Any

from tasks.guard import import_great_expectations

LARGEST = sys.float_info.max  # an interval with these ends holds every finite number
SHA256 = "^[0-9a-f]{64}$"
ACCURACIES = ("acc", "acc_norm", "exact_match")


def calibration(minimum_rows: int, minimum_characters: int = 1, maximum_characters: int = 100_000) -> list[Any]:
    """Expectations of `tasks.tables.calibration_table`: enough distinct texts, none of which evaluation uses."""
    gxe = import_great_expectations().expectations
    return [
        *_texts(minimum_rows, minimum_characters, maximum_characters),
        gxe.ExpectColumnValuesToBeNull(
            column="found_in_evaluation", description="No calibration text appears in the evaluation sets."
        ),
    ]


def heldout(minimum_rows: int = 1, minimum_characters: int = 1, maximum_characters: int = 10_000_000) -> list[Any]:
    """Expectations of `tasks.tables.heldout_table`: enough distinct texts."""
    return _texts(minimum_rows, minimum_characters, maximum_characters)


def evaluation_texts(tasks: Sequence[str], minimum_rows: int = 1) -> list[Any]:
    """Expectations of `tasks.tables.evaluation_table`: every task has rows, every row a text and its digest."""
    gxe = import_great_expectations().expectations
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=minimum_rows),
        _complete("task"),
        gxe.ExpectColumnValuesToBeInSet(column="task", value_set=sorted(tasks)),
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="task", value_set=sorted(tasks), description="Every task of the recipe has rows."
        ),
        _complete("id"),
        _complete("field"),
        gxe.ExpectCompoundColumnsToBeUnique(column_list=["task", "id", "field"]),
        _complete("text"),
        gxe.ExpectColumnValueLengthsToBeBetween(column="text", min_value=1),
        _complete("text_sha256"),
        gxe.ExpectColumnValuesToMatchRegex(column="text_sha256", regex=SHA256),
    ]


def hidden_states(layers: int, samples: int) -> list[Any]:
    """Expectations of `tasks.tables.hidden_states_table` for L ``layers`` (plus the embedding) and N samples."""
    gxe = import_great_expectations().expectations
    return [
        gxe.ExpectTableRowCountToEqual(value=layers + 1, description="The embedding and every layer's output."),
        gxe.ExpectColumnValuesToBeInSet(column="samples", value_set=[samples]),
        gxe.ExpectColumnValuesToBeBetween(
            column="finite_fraction", min_value=1, max_value=1, description="No hidden state is NaN or infinite."
        ),
        *[_complete(column) for column in ("finite_fraction", "norm_mean", "norm_min", "norm_max")],
        gxe.ExpectColumnValuesToBeBetween(
            column="norm_min", min_value=0, strict_min=True, description="No text ends up at the origin."
        ),
        gxe.ExpectColumnValuesToBeBetween(column="norm_max", min_value=0, strict_min=True, max_value=LARGEST),
    ]


def scores(kind: str, layers: int, unit_diagonal: bool = True) -> list[Any]:
    """Expectations of `tasks.tables.scores_table`.

    Args:
        kind: "pairwise-similarity", "block-distance" or "layer-importance".
        layers: number of layers L.
        unit_diagonal: whether a layer's similarity with itself is 1 under the method's definition.
    """
    gxe = import_great_expectations().expectations
    if kind == "layer-importance":
        return [
            gxe.ExpectTableRowCountToEqual(value=layers),
            _complete("value"),
            gxe.ExpectColumnValuesToBeBetween(
                column="value", min_value=-LARGEST, max_value=LARGEST, description="The number is finite."
            ),
        ]
    diagonal = gxe.ExpectColumnValuesToBeBetween(
        column="diagonal_error", min_value=0, max_value=1e-9, description="A layer is fully similar to itself."
    )
    return [
        gxe.ExpectTableRowCountToEqual(value=layers * layers),
        _complete("value"),
        gxe.ExpectColumnValuesToBeBetween(column="value", min_value=0, max_value=1),
        gxe.ExpectColumnValuesToBeBetween(
            column="asymmetry", min_value=0, max_value=1e-9, description="The value of a and b is that of b and a."
        ),
        *([diagonal] if unit_diagonal and kind == "pairwise-similarity" else []),
    ]


def plan(layers_out: int) -> list[Any]:
    """Expectations of `tasks.tables.plan_table`: the target's count, adjacent layers of one kind, weights of 1."""
    gxe = import_great_expectations().expectations
    from great_expectations.expectations.row_conditions import Column

    summed = Column("verb") == "combine"
    return [
        gxe.ExpectTableRowCountToEqual(value=layers_out, description="As many layers remain as the target says."),
        *[_complete(column) for column in ("skipped", "kinds", "halves")],
        gxe.ExpectColumnValuesToBeUnique(column="first"),
        gxe.ExpectColumnValuesToBeBetween(
            column="skipped", min_value=0, max_value=0, description="Only adjacent layers are merged."
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="kinds", min_value=1, max_value=1, description="Layers of different kinds are never merged."
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="halves", min_value=2, max_value=2, description="Attention and MLP both come from the group."
        ),
        gxe.ExpectColumnValuesToNotBeNull(column="weight_sum", row_condition=summed),
        gxe.ExpectColumnValuesToBeBetween(
            column="weight_sum", min_value=1 - 1e-6, max_value=1 + 1e-6, row_condition=summed
        ),
    ]


def checkpoint(layers: int) -> list[Any]:
    """Expectations of `tasks.tables.checkpoint_table`: complete, finite, consistent, and generating the same cached."""
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


def evaluation_report(minimum_rows: int = 2) -> list[Any]:
    """Expectations of `tasks.tables.evaluation_report_table`: plausible figures, under equal n on both sides."""
    gxe = import_great_expectations().expectations
    from great_expectations.expectations.row_conditions import Column

    metric = Column("metric")
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=minimum_rows),
        gxe.ExpectColumnDistinctValuesToContainSet(column="model", value_set=["base", "candidate"]),
        gxe.ExpectCompoundColumnsToBeUnique(column_list=["model", "name", "metric"]),
        _complete("value"),
        gxe.ExpectColumnValuesToBeBetween(
            column="value", min_value=-LARGEST, max_value=LARGEST, description="The number is finite."
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="value",
            min_value=0,
            max_value=1,
            row_condition=metric.is_in(list(ACCURACIES)),
            description="An accuracy is a share.",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="value", min_value=1, row_condition=metric == "perplexity", description="A perplexity is at least 1."
        ),
        # One item has no standard error; its score is still a score.
        gxe.ExpectColumnValuesToNotBeNull(column="stderr", severity="warning"),
        gxe.ExpectColumnValuesToBeBetween(column="stderr", min_value=0, max_value=LARGEST),
        _complete("n"),
        gxe.ExpectColumnValuesToBeBetween(column="n", min_value=1),
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="n",
            column_B="n_of_other",
            ignore_row_if="neither",
            description="Base and candidate are measured on the same items.",
        ),
    ]


def _texts(minimum_rows: int, minimum_characters: int, maximum_characters: int) -> list[Any]:
    gxe = import_great_expectations().expectations
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=minimum_rows),
        _complete("text"),
        _complete("source"),
        gxe.ExpectColumnValuesToBeBetween(
            column="characters", min_value=minimum_characters, max_value=maximum_characters
        ),
        gxe.ExpectColumnValuesToBeUnique(column="text_sha256", description="No text occurs twice."),
    ]


def _complete(column: str) -> Any:
    return import_great_expectations().expectations.ExpectColumnValuesToNotBeNull(column=column)
