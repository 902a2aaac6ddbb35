"""Groups of lm-eval's: their tasks, and the mean that is formed of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.errors import RecipeError
from mka.evaluation.definitions import Definition
from mka.evaluation.packaged import NotRunError, define_packaged, find_packaged, read_packaged
from mka.evaluation.task_index import Entry, read_index
from mka.evaluation.task_keys import SCORED

# Of a group's definition; the others change its members.
_OF_GROUPS = frozenset({"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"})


@dataclass(frozen=True)
class Named:
    """What a name stands for.

    Attributes:
        tasks: measured together; one, or those of a group.
        metric: of the score.
        by_size: whether each item of a group weighs the same; else each of its tasks.
    """

    tasks: tuple[Definition, ...]
    metric: str
    by_size: bool = True


def changes_members(body: Mapping[str, Any]) -> bool:
    """Whether a group says of its members what they do not say themselves."""
    members = body.get("task") or []
    return bool(body.keys() - _OF_GROUPS) or any(
        isinstance(m, dict) for m in (members if isinstance(members, list) else [])
    )


def find_group(name: str, entry: Entry) -> Named | None:
    """Return a group's tasks, if lm-eval forms a mean of them that is one of what is scored here.

    Raises:
        RecipeError: if one of them is not run here.
    """
    if entry.kind != "group":
        return None
    body = read_packaged(find_packaged() / entry.file)
    means = body.get("aggregate_metric_list") or []
    means = {mean.get("metric"): mean for mean in (means if isinstance(means, list) else [means])}
    leaves = list(_list_leaves(name, body, {}))
    for metric in (
        metric for metric in SCORED if metric in means and means[metric].get("aggregation", "mean") == "mean"
    ):
        if all(any(row.get("metric") == metric for row in said.get("metric_list") or []) for _, _, said in leaves):
            wanted = means[metric].get("filter_list")
            wanted = wanted[0] if isinstance(wanted, list) and wanted else wanted
            tasks = tuple(_define_leaf(name, *leaf, wanted) for leaf in leaves)
            return Named(tasks, metric, bool(means[metric].get("weight_by_size", True)))
    return None


def _define_leaf(group: str, name: str, file: Path, body: Mapping[str, Any], wanted: str | None) -> Definition:
    try:
        return define_packaged(name, file, body, wanted)
    except NotRunError as error:
        raise RecipeError(f"group {group!r}: its task {name!r} is not run here: {error}") from None


def _list_leaves(
    group: str, body: Mapping[str, Any], said: Mapping[str, Any]
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Yield the tasks of a group and of the groups within it, with what those say of them, as lm-eval does.

    Yields:
        Name, file, and what it says.
    """
    index, folder = read_index(), find_packaged()
    said = {key: value for key, value in body.items() if key not in _OF_GROUPS} | dict(said)
    members = body.get("task") or []
    for member in members if isinstance(members, list) else [members]:
        more = {} if isinstance(member, str) else dict(member)
        name = member if isinstance(member, str) else str(more.pop("group", None) or more.pop("task", ""))
        entry = index.get(name)
        if entry is None:
            inner = [{**more, "group": f"{group}::{name}"}] if "task" in more else []
            for one in inner:
                yield from _list_leaves(f"{group}::{name}", one, said)
            if not inner:
                yield f"{group}::{name}", folder, {**said, **more}
        elif entry.kind == "tag":
            for tagged in entry.members:
                file = folder / index[tagged].file
                yield tagged, file, {**read_packaged(file), **said, **more}
        elif entry.kind == "group":
            yield from _list_leaves(name, read_packaged(folder / entry.file), {**said, **more})
        else:
            yield name, folder / entry.file, {**read_packaged(folder / entry.file), **said, **more}
