"""The door in front of everything: texts that are there, distinct, and not used by evaluation."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mka.errors import CalibrationError
from mka.texts.rows import EXCERPT_CHARACTERS, text_digest
from tasks.guards.columns import expect_complete, make_nullable
from tasks.guards.guard import import_great_expectations

if TYPE_CHECKING:
    import pandas as pd

SHA256 = "^[0-9a-f]{64}$"


def calibration_suite(minimum_rows: int, minimum_characters: int = 1, maximum_characters: int = 100_000) -> list[Any]:
    """Expectations of `calibration_table`: enough distinct texts, none of which evaluation uses."""
    gxe = import_great_expectations().expectations
    return [
        *_texts(minimum_rows, minimum_characters, maximum_characters),
        gxe.ExpectColumnValuesToBeNull(
            column="found_in_evaluation", description="No calibration text appears in the evaluation sets."
        ),
    ]


def heldout_suite(
    minimum_rows: int = 1, minimum_characters: int = 1, maximum_characters: int = 10_000_000
) -> list[Any]:
    """Expectations of `heldout_table`: enough distinct texts."""
    return _texts(minimum_rows, minimum_characters, maximum_characters)


def evaluation_texts_suite(tasks: Sequence[str], minimum_rows: int = 1) -> list[Any]:
    """Expectations of `evaluation_table`: every task has rows, every row a text and its digest."""
    gxe = import_great_expectations().expectations
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=minimum_rows),
        expect_complete("task"),
        gxe.ExpectColumnValuesToBeInSet(column="task", value_set=sorted(tasks)),
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="task", value_set=sorted(tasks), description="Every task of the recipe has rows."
        ),
        expect_complete("id"),
        expect_complete("field"),
        gxe.ExpectCompoundColumnsToBeUnique(column_list=["task", "id", "field"]),
        expect_complete("text"),
        gxe.ExpectColumnValueLengthsToBeBetween(column="text", min_value=1),
        expect_complete("text_sha256"),
        gxe.ExpectColumnValuesToMatchRegex(column="text_sha256", regex=SHA256),
    ]


def _texts(minimum_rows: int, minimum_characters: int, maximum_characters: int) -> list[Any]:
    gxe = import_great_expectations().expectations
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=minimum_rows),
        expect_complete("text"),
        expect_complete("source"),
        gxe.ExpectColumnValuesToBeBetween(
            column="characters", min_value=minimum_characters, max_value=maximum_characters
        ),
        gxe.ExpectColumnValuesToBeUnique(column="text_sha256", description="No text occurs twice."),
    ]


EVALUATION_COLUMNS = ("task", "id", "field", "text", "text_sha256")


def calibration_table(
    texts: Sequence[str | None],
    sources: Sequence[str | None],
    evaluation_digests: Collection[str] | Mapping[str, str],
    digest_fn: Callable[[str], str] = text_digest,
) -> "pd.DataFrame":
    """One row per calibration text, with the evaluation set it was found in, if any.

    Args:
        texts: S texts.
        sources: where each of them comes from, S names.
        evaluation_digests: digests of every text that evaluation uses; a mapping also says to which task each belongs.
        digest_fn: the digest those were made with.

    Returns:
        Columns row, source, text, characters, text_sha256, found_in_evaluation ("task: first 60 characters" or null).
    """
    table = heldout_table(texts, sources, digest_fn)
    tasks = evaluation_digests if isinstance(evaluation_digests, Mapping) else {}
    found = [
        f"{tasks.get(digest, 'evaluation')}: {' '.join(text.split())[:EXCERPT_CHARACTERS]}"
        if isinstance(text, str) and digest in evaluation_digests
        else None
        for text, digest in zip(table["text"], table["text_sha256"], strict=True)
    ]
    return table.assign(found_in_evaluation=make_nullable(found))


def heldout_table(
    texts: Sequence[str | None], sources: Sequence[str | None], digest_fn: Callable[[str], str] = text_digest
) -> "pd.DataFrame":
    """One row per text: columns row, source, text, characters, text_sha256.

    Raises:
        CalibrationError: if there are not as many sources as texts.
    """
    import pandas as pd

    if len(texts) != len(sources):
        raise CalibrationError(f"{len(texts)} texts but {len(sources)} sources; give one source per text")
    return pd.DataFrame(
        {
            "row": range(len(texts)),
            "source": make_nullable(sources),
            "text": make_nullable(texts),
            "characters": [0 if text is None else len(text) for text in texts],
            "text_sha256": make_nullable([None if text is None else digest_fn(text) for text in texts]),
        }
    )


def evaluation_table(rows: Iterable[Mapping[str, Any]]) -> "pd.DataFrame":
    """One row per text that evaluation uses: columns task, id, field, text, text_sha256.

    A column that no row has is left out, so that its expectations fail instead of passing on nothing.
    """
    import pandas as pd

    rows = list(rows)
    columns = [column for column in EVALUATION_COLUMNS if not rows or any(column in row for row in rows)]
    return pd.DataFrame({column: make_nullable([row.get(column) for row in rows]) for column in columns})
