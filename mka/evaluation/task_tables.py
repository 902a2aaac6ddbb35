"""Local tables in place of the hub's data sets, behind lm-eval's own task definitions."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from mka.errors import RecipeError
from mka.evaluation.definitions import Definition
from mka.evaluation.packaged import find_packaged
from mka.outside.printable import describe_error
from mka.outside.reading import parse_json, quote, read_within
from mka.texts.rows import LARGEST_TABLE

# Task -> (file in lm_eval/tasks, columns it reads).
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hellaswag": ("hellaswag/hellaswag.yaml", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "piqa": ("piqa/piqa.yaml", ("goal", "sol1", "sol2", "label")),
    "arc_easy": ("arc/arc_easy.yaml", ("question", "choices", "answerKey")),
    "arc_challenge": ("arc/arc_challenge.yaml", ("question", "choices", "answerKey")),
    "winogrande": ("winogrande/default.yaml", ("sentence", "option1", "option2", "answer")),
    "boolq": ("super_glue/boolq/default.yaml", ("passage", "question", "label")),
    "lambada_openai": ("lambada/lambada_openai.yaml", ("text",)),
}
MMLU = "mmlu"
MMLU_FOLDER = "mmlu/default"
MMLU_LETTERS = "ABCD"
# Of lists and objects within one another; the library that holds the rows takes twice as long for each.
DEEPEST_VALUE = 8
MMLU_COLUMNS = ("question", "choices", "answer")


@cache
def list_mmlu() -> tuple[str, ...]:
    """Return the task names of MMLU's 57 subjects, e.g. "mmlu_anatomy"."""
    return tuple(sorted(path.stem for path in (find_packaged() / MMLU_FOLDER).glob("mmlu_*.yaml")))


def is_built_in(name: str) -> bool:
    """Whether a name is one of lm-eval's own tasks that the project has tables of."""
    return name in TASKS or name == MMLU or (name.startswith(f"{MMLU}_") and name in list_mmlu())


def hold_tables(definition: Definition) -> dict[str, Any]:
    """Put the tables of a task of one's own in the place of its data.

    Raises:
        RecipeError: if a table is empty or unreadable.
    """
    rows = {split: read_table(definition.name, path) for split, path in definition.tables.items()}
    return {"custom_dataset": _hold_rows(rows)}


def name_tables(name: str, folder: Path, shots: int | None = 0) -> dict[str, Path]:
    """Say where the tables of a task of lm-eval's own lie: split -> file. Of all MMLU the subject is ``*``."""
    if name in TASKS:
        files = {"validation": folder / f"{name}.jsonl"}
        return files | ({"train": folder / f"{name}.train.jsonl"} if shots else {})
    subject = "*" if name == MMLU else name.removeprefix(f"{MMLU}_")
    return {split: folder / MMLU / f"{subject}.{split}.jsonl" for split in ("test", "dev")}


def list_tables(folder: Path, task: str, *, every: bool = False, shots: int | None = 0) -> list[Path]:
    """List the project's tables of a task that are there: of its items, or every one that decides a score.

    Args:
        folder: holds them.
        task: of `TASKS`, "mmlu" or one of its subjects.
        every: few-shot examples too.
        shots: few-shot examples per item; with any, the train table is one of every.
    """
    files = list(name_tables(task, folder, shots).values())
    wanted = files if every else files[:1]
    return sorted(found for file in wanted for found in file.parent.glob(file.name))


def override_tables(name: str, folder: Path, shots: int | None) -> dict[str, Any]:
    """Point a task definition at local tables; prompts and metrics stay lm-eval's.

    Args:
        name: a task of `TASKS`, or one subject of MMLU.
        folder: holds ``TASK.jsonl``, ``TASK.train.jsonl`` and ``mmlu/SUBJECT.test.jsonl`` with ``.dev.jsonl``.
        shots: few-shot examples per item; with any, the train table is needed.

    Returns:
        Fields of lm-eval's task definition, in place of its own.

    Raises:
        RecipeError: if a table is missing, empty, unreadable or lacks columns.
    """
    files = name_tables(name, folder, shots)
    splits: dict[str, str | None] = {}
    if name in TASKS:
        # ARC's definition would ask for a split "test"; the table is whichever was at hand.
        splits = {"training_split": None, "validation_split": "validation", "test_split": None}
        splits |= {"training_split": "train"} if shots else {}
    columns = TASKS[name][1] if name in TASKS else MMLU_COLUMNS
    rows = {split: read_table(name, path, columns) for split, path in files.items()}
    return {"custom_dataset": _hold_rows(rows), **splits}


def _hold_rows(rows: dict[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    # A function rather than the "json" builder: that one guesses dates out of strings and fills a disk cache.
    def custom_dataset(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(table) for split, table in rows.items()})

    return custom_dataset


def read_table(name: str, path: Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read the items of a task.

    Args:
        name: of the task.
        path: JSON lines.
        columns: what every item has to have, each of the kind that its task reads.

    Raises:
        RecipeError: if it is missing, empty, unreadable, or an item is none.
    """
    try:
        lines = read_within(path, LARGEST_TABLE).decode("utf-8").split("\n")
        rows = [parse_json(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise RecipeError(
            f"task {name!r}: its table {path} is missing; build the tables with `dvc repro`, or set "
            "evaluation.tasks_folder to null to download them from the hub"
        ) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"task {name!r}: {path} is not readable as JSON lines ({describe_error(error)})") from None
    if not rows:
        raise RecipeError(f"task {name!r}: {path} holds no items; build it with `dvc repro`")
    for number, row in enumerate(rows, 1):
        if missing := [c for c in columns if not isinstance(row, dict) or row.get(c) is None]:
            raise RecipeError(
                f"task {name!r}: {path} item {number} lacks {', '.join(missing)}; needed columns: {', '.join(columns)}"
            )
        if not isinstance(row, dict):
            raise RecipeError(f"task {name!r}: {path} item {number} is no object with columns, got {quote(row)}")
        if deep := [column for column, value in row.items() if _is_deeper(value, DEEPEST_VALUE)]:
            raise RecipeError(
                f"task {name!r}: {path} item {number}: {quote(deep[0])} is nested deeper than {DEEPEST_VALUE} levels"
            )
        for column in columns:
            if not _fits(row, column):
                raise RecipeError(f"task {name!r}: {path} item {number}: {column} cannot be {quote(row[column])}")
    return rows


def _is_deeper(value: Any, most: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most < 0 or any(_is_deeper(one, most - 1) for one in inner)


def _fits(row: dict[str, Any], column: str) -> bool:
    """Whether a column holds what lm-eval's definitions make of it: a text, options, or which of them is right."""
    value = row[column]
    if column == "endings":
        return are_options(value)
    if column == "choices":  # of ARC with their letters, of MMLU the four texts alone
        if "answerKey" not in row:
            return are_options(value) and len(value) == len(MMLU_LETTERS)
        texts, letters = (value.get(key) if isinstance(value, dict) else None for key in ("text", "label"))
        return are_options(texts) and are_options(letters) and len(texts) == len(letters)
    if column == "answerKey":
        return isinstance(row["choices"], dict) and value in (row["choices"].get("label") or ())
    if column in ("label", "answer"):
        allowed = range(len(row["endings"])) if "endings" in row else range(2)
        allowed = range(len(MMLU_LETTERS)) if "choices" in row else range(1, 3) if "option1" in row else allowed
        return type(value) in (int, str) and str(value) in map(str, allowed)
    return isinstance(value, str)


def are_options(value: Any) -> TypeGuard[list[str]]:
    """Whether a value is two or more texts to choose from."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(option, str) for option in value)
