"""All names of tasks with what they are, for people who look for one."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from mka.evaluation.catalog import Catalog
from mka.evaluation.definitions import Definition
from mka.evaluation.task_data import list_kept
from mka.evaluation.task_index import Entry, read_index
from mka.evaluation.task_tables import is_built_in, list_tables

YES, ABSENT, MEMBERS = "yes", "safe; its data are not on this machine", "depends on its members"


def list_names(catalog: Catalog, pattern: str = "*") -> list[dict[str, Any]]:
    """Return one row per name: ``name``, ``kind``, ``output_type``, ``data``, ``runs`` and, of groups, ``members``.

    ``runs`` is "yes", or says what is missing; a group's depends on its members.

    Args:
        catalog: the tasks there are.
        pattern: of names, as shells have it.

    Raises:
        RecipeError: if a definition of one's own cannot be read.
    """
    index = read_index()
    kept: dict[tuple[str, str | None], bool] = {}
    rows = []
    for name in sorted({*index, *catalog.own}):
        if fnmatch.fnmatchcase(name, pattern):
            own = catalog.own.get(name)
            rows.append(_describe_own(name, own) if own else _describe(name, index[name], catalog, kept))
    return rows


def list_all_names(catalog: Catalog) -> list[str]:
    """Return every name there is."""
    return sorted({*read_index(), *catalog.own})


def _describe_own(name: str, tasks: Sequence[Definition]) -> dict[str, Any]:
    kinds = sorted({str(task.body.get("output_type", "generate_until")) for task in tasks})
    data = sorted({t.data.label if t.data else ", ".join(p.name for p in t.tables.values()) for t in tasks})
    there = all(task.data is None or list_kept(task.data.path, task.data.name) for task in tasks)
    grouped = {"members": [task.name for task in tasks]} if [task.name for task in tasks] != [name] else {}
    kind = "own group" if grouped else "own task"
    what = {"name": name, "kind": kind, "output_type": ", ".join(kinds), "data": ", ".join(data)}
    return {**what, "runs": YES if there else ABSENT, **grouped}


def _describe(name: str, entry: Entry, catalog: Catalog, kept: dict[tuple[str, str | None], bool]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "kind": entry.kind, "output_type": entry.output_type, "data": entry.data}
    if catalog.folder is not None and is_built_in(name):
        there = bool(list_tables(catalog.folder, name))
        return row | {"data": f"tables in {catalog.folder}", "runs": YES if there else ABSENT}
    if entry.kind != "task":
        return row | {"runs": MEMBERS, "members": list(entry.members)}
    if entry.why:
        return row | {"runs": f"no: {entry.why}"}
    place = (entry.path, entry.name)
    if place not in kept:
        kept[place] = bool(list_kept(*place))
    return row | {"runs": YES if kept[place] else ABSENT}
