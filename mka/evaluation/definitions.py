"""Tasks of one's own: lm-eval's definitions in YAML, beside the JSON lines they read, in the folder of the tables.

A definition is text for lm-eval to format and score by; one that would run Python of its own, or read files from
elsewhere, is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.errors import RecipeError
from mka.outside.reading import UnreadableError, quote, read_within
from mka.sections import parse_yaml

LARGEST_DEFINITION = 1_000_000
# The first of these that a definition asks for is its score.
SCORED = ("acc_norm", "acc", "exact_match")
# What a definition says of where its data are; said anew, of the tables in the folder.
_DATA = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
# What lm-eval would follow to files and code that stand elsewhere.
_ELSEWHERE = ("include", "class", "custom_dataset", "unsafe_code", "use_prompt")


@dataclass(frozen=True)
class Definition:
    """One task.

    Attributes:
        name: of the task.
        file: the YAML.
        body: what it says, without where its data are.
        tables: split -> JSON lines in the same folder; the first is what is measured on.
    """

    name: str
    file: Path
    body: Mapping[str, Any]
    tables: Mapping[str, Path]

    @property
    def metric(self) -> str:
        """What is measured."""
        asked = [entry["metric"] for entry in self.body["metric_list"]]
        return next(name for name in SCORED if name in asked)


def read_definitions(folder: Path | None) -> dict[str, tuple[Definition, ...]]:
    """Read the definitions of a folder: name of a task or group -> its tasks.

    Args:
        folder: of the tables; one that is missing has none.

    Raises:
        RecipeError: if one cannot be read, defines no task, asks for what is not run here, or names a table that is not
            in the folder.
    """
    if folder is None or not folder.is_dir():
        return {}
    tasks: dict[str, Definition] = {}
    groups: dict[str, tuple[Path, list[str]]] = {}
    for file in sorted(folder.glob("*.yaml")):
        body = _read(file)
        name = body.get("group", body.get("task"))
        if not isinstance(name, str) or not name.isprintable() or not name.strip():
            raise RecipeError(f"{file}: defines no task; lm-eval's key for its name is `task`, or `group`")
        if name in tasks or name in groups:
            raise RecipeError(f"{file}: task {name!r} is defined twice in its folder; give one another name")
        if "group" in body:
            groups[name] = file, _list_members(file, body.get("task"))
        else:
            tasks[name] = _define(name, file, body)
    found: dict[str, tuple[Definition, ...]] = {name: (task,) for name, task in tasks.items()}
    for name, (file, members) in groups.items():
        if strange := [member for member in members if member not in tasks]:
            raise RecipeError(f"{file}: {strange[0]!r} is no task that is defined in the same folder")
        if len({tasks[member].metric for member in members}) > 1:
            raise RecipeError(f"{file}: its tasks are scored by different metrics, of which there is no mean")
        found[name] = tuple(tasks[member] for member in members)
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        text = read_within(file, LARGEST_DEFINITION).decode()
        if "!function" in text:
            raise RecipeError(f"{file}: runs Python of its own (!function), which is not done here; write a template")
        body = parse_yaml(text)
    except (OSError, UnreadableError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read as a task definition: {error}") from None
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise RecipeError(f"{file}: is no task definition, which is a mapping with `task`")
    if elsewhere := [key for key in _ELSEWHERE if key in body]:
        raise RecipeError(
            f"{file}: {elsewhere[0]} leads out of the file, which is not followed; write out what it means"
        )
    return body


def _list_members(file: Path, members: Any) -> list[str]:
    if not isinstance(members, list) or not members or not all(isinstance(member, str) for member in members):
        raise RecipeError(f"{file}: a group's `task` is a list of names, got {quote(members)}")
    if len(set(members)) < len(members):
        raise RecipeError(f"{file}: a task stands twice in the group")
    return members


def _define(name: str, file: Path, body: dict[str, Any]) -> Definition:
    metrics = body.get("metric_list")
    named = [entry.get("metric") for entry in metrics if isinstance(entry, dict)] if isinstance(metrics, list) else []
    if not named or len(named) < len(metrics or ()) or not any(metric in SCORED for metric in named):
        raise RecipeError(
            f"{file}: metric_list asks for none of {', '.join(SCORED)}, which are what a score is made of"
        )
    if body.get("dataset_path") != "json":
        given = quote(body.get("dataset_path"))
        raise RecipeError(f"{file}: dataset_path is {given}; allowed: json, with data_files beside the definition")
    kwargs = body.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    files = {"train": files} if isinstance(files, str) else files
    if not isinstance(files, dict) or not files:
        raise RecipeError(f"{file}: dataset_kwargs has no data_files, the JSON lines of each split")
    wanted = {body[key] for key in _SPLITS if isinstance(body.get(key), str)}
    measured = body.get("test_split") or body.get("validation_split")
    if not isinstance(measured, str) or not wanted <= files.keys():
        asked = ", ".join(sorted(wanted)) or "no split to measure on"
        raise RecipeError(f"{file}: data_files has {', '.join(map(str, files))}, asked for: {asked}")
    tables = {split: _find_table(file, files[split]) for split in sorted(wanted, key=lambda split: split != measured)}
    kept = {key: value for key, value in body.items() if key not in _DATA}
    return Definition(name, file, kept, tables)


def _find_table(file: Path, given: Any) -> Path:
    """Find a table by its name: where the folder was written down, it may be copied from since."""
    one = given[0] if isinstance(given, list) and len(given) == 1 else given
    name = Path(one).name if isinstance(one, str) and one.isprintable() and len(one) < 1024 else ""
    if not name or not (table := file.parent / name).is_file():
        raise RecipeError(f"{file}: its table {quote(given)} is not in {file.parent}; put it beside the definition")
    return table
