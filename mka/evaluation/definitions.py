"""Tasks of one's own: lm-eval's definitions in YAML, beside the JSON lines they read, in the folder of the tables.

A definition is text for lm-eval to format and score by; one that would run Python of its own, or read files from
elsewhere, is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mka.errors import RecipeError
from mka.evaluation.task_data import HubData, read_hub_data
from mka.evaluation.task_keys import SCORED_BY, TaskKeys
from mka.outside.reading import UnreadableError, quote, read_within
from mka.sections import explain_validation, parse_yaml

# Bytes; the longest of lm-eval's own, with a prompt in Thai, has 63 thousand.
LARGEST_DEFINITION = 150_000
# A task's name stands in options (`--task NAME=200`), tables and reports.
_NAME = re.compile(r"[\w.+-]{1,100}")
# Said anew, of the tables in the folder and of the version alone; and what lm-eval does nothing with here.
_LEFT_OUT = frozenset({"dataset_path", "dataset_name", "dataset_kwargs", "metadata"})
_LEFT_OUT |= {"should_decontaminate", "doc_to_decontamination_query", "tag"}
# What lm-eval would follow to files and code that stand elsewhere.
_ELSEWHERE = ("include", "class", "custom_dataset", "unsafe_code", "use_prompt", "process_docs", "process_results")


@dataclass(frozen=True)
class Definition:
    """One task.

    Attributes:
        name: of the task.
        file: the YAML.
        body: what it says, without where its data are.
        metric: what is measured.
        tables: split -> JSON lines in the same folder; the first is what is measured on.
        data: of the hub, where there are no tables.
        own: whether it is somebody's own, and not lm-eval's.
    """

    name: str
    file: Path
    body: Mapping[str, Any]
    metric: str
    tables: Mapping[str, Path] = field(default_factory=dict)
    data: HubData | None = None
    own: bool = True


def read_definitions(folder: Path | None, *, on_hub: bool = False) -> dict[str, tuple[Definition, ...]]:
    """Read the definitions of a folder: name of a task or group -> its tasks.

    Args:
        folder: of the tables; one that is missing has none.
        on_hub: whether folders within it are looked through too, and data sets may be those of a hub.

    Raises:
        RecipeError: if one cannot be read, defines no task, asks for what is not run here, or names a table that is not
            in the folder.
    """
    if folder is None or not folder.is_dir():
        return {}
    tasks: dict[str, Definition] = {}
    groups: dict[str, tuple[Path, list[str]]] = {}
    for file in sorted(folder.glob("**/*.yaml" if on_hub else "*.yaml")):
        body = _read(file)
        name = body.get("group", body.get("task"))
        if not isinstance(name, str):
            raise RecipeError(f"{file}: defines no task; lm-eval's key for its name is `task`, or `group`")
        if not _NAME.fullmatch(name):
            raise RecipeError(f"{file}: a task's name is at most 100 letters, digits and _.+-, got {quote(name)}")
        if name in tasks or name in groups:
            raise RecipeError(f"{file}: task {name!r} is defined twice in its folder; give one another name")
        if "group" in body:
            groups[name] = file, _list_members(file, body.get("task"))
        else:
            tasks[name] = _define(name, file, body, on_hub)
    found: dict[str, tuple[Definition, ...]] = {name: (task,) for name, task in tasks.items()}
    for name, (file, members) in groups.items():
        if strange := [member for member in members if member not in tasks]:
            raise RecipeError(f"{file}: {strange[0]!r} is no task that is defined in the same folder")
        if len({tasks[member].metric for member in members}) > 1:
            raise RecipeError(f"{file}: its tasks are scored by different metrics, of which there is no mean")
        found[name] = tuple(tasks[member] for member in members)
    return found


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():  # a pipe would be waited for
        raise RecipeError(f"{file}: cannot be read as a task definition: it is no file")
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


def _define(name: str, file: Path, body: dict[str, Any], on_hub: bool) -> Definition:
    try:
        keys = TaskKeys.model_validate(body)
    except ValidationError as error:
        raise RecipeError(explain_validation(error, TaskKeys, str(file))) from None
    if not keys.scored:
        allowed = SCORED_BY[keys.output_type]
        raise RecipeError(
            f"{file}: metric_list asks for none of {', '.join(allowed)}, which are what a score of output_type "
            f"{keys.output_type} is made of"
        )
    data = None
    if on_hub and keys.dataset_path not in ("json", None):
        try:
            data = read_hub_data(keys)
        except ValueError as error:
            raise RecipeError(f"{file}: {error}") from None
    tables = {} if data else _find_tables(file, keys)
    return Definition(name, file, strip_body(body, keys, keys.scored), keys.scored[0]["metric"], tables, data)


def strip_body(body: Mapping[str, Any], keys: TaskKeys, scored: list[dict[str, Any]]) -> dict[str, Any]:
    """Leave out of a definition where its data are, and what lm-eval does nothing with here."""
    kept = {key: value for key, value in body.items() if key not in _LEFT_OUT}
    kept |= {"metric_list": scored}
    return kept | ({"metadata": {"version": keys.metadata.version}} if keys.metadata.version is not None else {})


def _find_tables(file: Path, keys: TaskKeys) -> dict[str, Path]:
    if keys.dataset_path != "json":
        given = quote(keys.dataset_path)
        raise RecipeError(f"{file}: dataset_path is {given}; allowed: json, with data_files beside the definition")
    files = keys.dataset_kwargs.get("data_files") if isinstance(keys.dataset_kwargs, dict) else None
    files = {"train": files} if isinstance(files, str) else files
    if not isinstance(files, dict) or not files:
        raise RecipeError(f"{file}: dataset_kwargs has no data_files, the JSON lines of each split")
    measured = keys.test_split or keys.validation_split
    if not measured or not keys.splits <= files.keys():
        asked = ", ".join(sorted(keys.splits)) or "no split to measure on"
        raise RecipeError(f"{file}: data_files has {', '.join(map(str, files))}, asked for: {asked}")
    return {split: _find_table(file, files[split]) for split in sorted(keys.splits, key=lambda s: (s != measured, s))}


def _find_table(file: Path, given: Any) -> Path:
    """Find a table by its name: where the folder was written down, it may be copied from since."""
    one = given[0] if isinstance(given, list) and len(given) == 1 else given
    name = Path(one).name if isinstance(one, str) and one.isprintable() else ""
    # Among what is there: a name may be longer than the system takes one.
    found = next((path for path in file.parent.iterdir() if path.name == name and path.is_file()), None)
    if found is None:
        raise RecipeError(f"{file}: its table {quote(given)} is not in {file.parent}; put it beside the definition")
    return found
