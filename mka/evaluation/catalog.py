"""What the name of a task stands for: the project's tables, a definition of one's own, or any that lm-eval has."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import RecipeError, nearest, require_extra
from mka.evaluation.definitions import Definition, read_definitions
from mka.evaluation.packaged import NotRunError, define_packaged, find_packaged, read_packaged
from mka.evaluation.task_data import find_commit, read_hub_texts
from mka.evaluation.task_groups import Named, changes_members, find_group
from mka.evaluation.task_index import Entry, read_index
from mka.evaluation.task_tables import MMLU, MMLU_FOLDER, TASKS, is_built_in, list_mmlu, list_tables, read_table

if TYPE_CHECKING:
    from mka.recipe import Measurement


@dataclass(frozen=True)
class Catalog:
    """The tasks there are.

    Attributes:
        folder: the project's tables, with definitions of one's own beside them; None: data sets come from the hub.
        include: further definitions of one's own.
    """

    folder: Path | None = None
    include: Path | None = None

    def find(self, name: str) -> Named:
        """Return what a name stands for.

        Raises:
            RecipeError: if it is unknown, not run here, or stands for several scores.
        """
        if name in TASKS:
            return _define_one(name, find_packaged() / TASKS[name][0])
        if is_built_in(name):
            subjects = list_mmlu() if name == MMLU else [name]
            tasks = [_define_one(one, find_packaged() / MMLU_FOLDER / f"{one}.yaml").tasks[0] for one in subjects]
            return Named(tuple(tasks), "acc")
        if defined := self.own.get(name):
            return Named(defined, defined[0].metric)
        entry = self._look_up(name)
        if entry.kind == "task":
            return _define_one(name, find_packaged() / entry.file)
        if (found := find_group(name, entry)) is not None:
            return found
        raise RecipeError(f"{entry.kind} {name!r} stands for several scores; name them: {_list(entry.members)}")

    @property
    def place(self) -> str:
        """Where definitions and tables are, in words."""
        return " and ".join(str(path) for path in (self.folder, self.include) if path is not None) or "lm-eval"

    def expand(self, tasks: Mapping[str, int | None]) -> dict[str, int | None]:
        """Replace names that stand for several scores, tags and groups without a mean, by their members.

        Raises:
            RecipeError: if one is unknown, or is a group that changes its members, which their names do not say.
        """
        found: dict[str, int | None] = {}
        for name, limit in tasks.items():
            if is_built_in(name) or name in self.own:
                _ask_once(found, name, limit)
                continue
            entry = self._look_up(name)
            if entry.kind == "task" or (entry.kind == "group" and find_group(name, entry) is not None):
                _ask_once(found, name, limit)
                continue
            if entry.kind == "group" and changes_members(read_packaged(find_packaged() / entry.file)):
                raise RecipeError(
                    f"group {name!r} says other things of its members than they do themselves, and lm-eval forms no "
                    f"mean of them; name those you want: {_list(entry.members)}"
                )
            for member in self._list_scores(name, entry):
                _ask_once(found, member, limit)
        return found

    def _list_scores(self, name: str, entry: Entry) -> list[str]:
        """Return the members of a tag or group, and in place of those that stand for several scores theirs."""
        found: list[str] = []
        refused: dict[str, str] = {}
        for member in entry.members:
            try:
                scores = list(self.expand({member: None}))
                for score in scores:
                    self.find(score)
                found += scores
            except RecipeError as error:
                refused[member] = str(error)
        if not refused:
            return found
        others = [member for member in entry.members if member not in refused]
        also = f" (nor are {_list(list(refused)[1:])})" if len(refused) > 1 else ""
        hint = f"name the others: {_list(others)}" if others else "no other is left"
        raise RecipeError(f"{entry.kind} {name!r}: {next(iter(refused.values()))}{also}; {hint}")

    def check(self, tasks: Mapping[str, int | None]) -> None:
        """Check names and numbers of items before anything is loaded.

        Raises:
            RecipeError: on an unknown or doubled task, a definition that is not run here, or fewer than two items (one
                item has no error bar).
            ExtraError: if the extra `eval` is not installed.
        """
        if tasks:
            require_extra("eval", f"task {next(iter(tasks))!r}")
        if shadowing := next(filter(is_built_in, {} if all(map(is_built_in, tasks)) else self.own), None):
            place = self.own[shadowing][0].file.parent
            raise RecipeError(
                f"task {shadowing!r} is one of lm-eval's own; give the definition in {place} another name"
            )
        owners: dict[str, tuple[str, int | None]] = {}
        for name, limit in tasks.items():
            if limit is not None and limit < 2:
                raise RecipeError(f"task {name!r}: {limit} items asked for, at least 2 are needed; null takes all")
            for task in self.find(name).tasks:
                other, asked = owners.setdefault(task.name, (name, limit))
                if other != name and (asked, limit) != (None, None):
                    whole, part = (other, name) if name == task.name else (name, other)
                    raise RecipeError(f"task {part!r} is part of {whole!r}; name one of the two")

    @cached_property
    def own(self) -> dict[str, tuple[Definition, ...]]:
        """The definitions of one's own: name of a task or group -> its tasks.

        Raises:
            RecipeError: if one cannot be read, or stands in both places.
        """
        beside = read_definitions(self.folder)
        if self.include is None:
            return beside
        if not self.include.is_dir():
            raise RecipeError(f"include_path {self.include} is no folder; it holds task definitions, NAME.yaml")
        further = read_definitions(self.include, on_hub=True)
        if doubled := sorted(beside.keys() & further.keys()):
            raise RecipeError(f"task {doubled[0]!r} is defined in {self.folder} and in {self.include}; rename one")
        return beside | further

    def reads_tables(self, task: Definition) -> bool:
        """Whether a task of lm-eval's is measured on the project's tables."""
        return not task.own and self.folder is not None and is_built_in(task.name)

    def list_files(self, name: str, *, every: bool = False, shots: int | None = 0) -> list[Path]:
        """List the files that a task is measured on and that are there: its items, or every one that decides a score.

        Args:
            name: of the task.
            every: few-shot examples and definitions of one's own too.
            shots: few-shot examples per item.
        """
        found: list[Path] = []
        for task in self.find(name).tasks:
            if self.reads_tables(task):
                assert self.folder is not None
                found += list_tables(self.folder, task.name, every=every, shots=shots)
            elif task.own:
                tables = list(task.tables.values())
                found += [*tables, task.file] if every else tables[:1]
        return sorted(found)

    def digest(self, name: str, shots: int | None) -> list[str]:
        """Say what decides the score of a task: its files by name, its data sets by commit, lm-eval's by its words."""
        from mka.store.sums import file_sha256

        files = self.list_files(name, every=True, shots=shots)
        said = [f"{file.name} {file_sha256(file)}" for file in files]
        for task in self.find(name).tasks:
            if task.data is not None and not self.reads_tables(task):
                said.append(f"{task.data.label}@{find_commit(task.data)}")
                body = json.dumps(task.body, sort_keys=True, default=str).encode()
                version = "" if task.own else f" lm-eval {importlib.metadata.version('lm-eval')}"
                said.append(f"{task.name} {hashlib.sha256(body).hexdigest()}{version}")
        return said

    def describe(self, name: str, built: Mapping[str, Any]) -> dict[str, Any]:
        """Say of a score how it was asked and where its data are from.

        Args:
            name: of the task.
            built: task -> lm-eval's, after it was asked.
        """
        tasks = self.find(name).tasks
        data = {t.data.label: find_commit(t.data) for t in tasks if t.data is not None and not self.reads_tables(t)}
        facts = {"shots": built[tasks[0].name].get_config("num_fewshot"), "source": "hub" if data else "tables"}
        return facts | ({"data": data} if data else {})

    def read_texts(self, name: str) -> Iterator[str]:
        """Yield the texts of a task's items, which no calibration text may hold.

        Raises:
            RecipeError: if a table cannot be read, or a data set not be had.
        """
        for table in self.list_files(name):
            for row in read_table(name, table):
                yield from (value for value in row.values() if isinstance(value, str))
        if is_built_in(name):  # of these there is an index of texts
            return
        for task in self.find(name).tasks:
            if task.data is not None and not self.reads_tables(task):
                yield from read_hub_texts(task.data, task.name)

    def _look_up(self, name: str) -> Entry:
        index = read_index()
        if name not in index:
            # Those that are at hand come first; among 14,000 there is one that is nearer to any slip.
            hint = nearest(name, [*self.own, *TASKS], cutoff=0.7) or nearest(name, index, 3)
            raise RecipeError(f"unknown task {name!r}{hint}; `mka tasks PATTERN` lists the {len(index)} of lm-eval")
        return index[name]


def _ask_once(found: dict[str, int | None], name: str, limit: int | None) -> None:
    if found.setdefault(name, limit) != limit:
        raise RecipeError(f"task {name!r} is asked for twice, also as a member, with other numbers of items; say one")


def open_catalog(settings: "Measurement") -> Catalog:
    """Return the catalog that a recipe names."""
    return Catalog(settings.tasks_folder, settings.include_path)


def _define_one(name: str, file: Path) -> Named:
    try:
        task = define_packaged(name, file, read_packaged(file))
    except NotRunError as error:
        raise RecipeError(f"task {name!r} is not run here: {error}") from None
    return Named((task,), task.metric)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
