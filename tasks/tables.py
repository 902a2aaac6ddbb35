"""The recipe's tables: found at their revisions, copied aside, and asked for what they will be read for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.errors import CalibrationError
from mka.outside.project import suggest_table
from mka.pipeline.written import TEXTS_FILE
from mka.recipe import BASE_TEXT, AlignmentSettings, HealSettings, Recipe
from mka.store.products import Product
from mka.texts.rows import read_rows
from tasks.machine.workplace import Workplace
from tasks.registry.naming import refuse_source_names
from tasks.versioned import Version, copy_tables, resolve_versions

# What a row of the overlap index has to have.
INDEX_COLUMNS = ("task", "id", "field", "text", "text_sha256")


@dataclass(frozen=True)
class Tables:
    """Where texts are read from.

    Attributes:
        versions: what each of the recipe's tables holds at its revision.
        copies: private copies of them.
        own_text: what the base wrote; None if no table is that.
    """

    versions: Mapping[str, Version]
    copies: Product
    own_text: Product | None

    def find(self, path: Path) -> Path:
        """Return the file or folder to read for a path of the recipe."""
        if path == BASE_TEXT and self.own_text is not None:
            return self.own_text.open() / TEXTS_FILE
        return self.copies.open() / self.versions[str(path)].copy

    def digest(self, recipe: Recipe, role: str, path: Path) -> dict[str, str]:
        """Return what keys a choice of texts: the table it is from and those it is kept apart from, by their roles.

        A table without sources is a source of its file's name, so that is part of it.
        """
        evaluation = recipe.evaluation
        roles = {role: path, "heldout": evaluation.text, "overlap index": evaluation.overlap_index}
        if evaluation.tasks:
            roles |= {"tasks": evaluation.tasks_folder, "included tasks": evaluation.include_path}
        named = {name: found for name, found in roles.items() if found is not None}
        return {
            name: self.own_text.digest
            if found == BASE_TEXT and self.own_text is not None
            else f"{self.versions[str(found)].digest} {found.name}"
            for name, found in named.items()
        }


@task(task_run_name="read tables", cache_policy=NO_CACHE)
def read_tables(place: Workplace, recipe: Recipe) -> tuple[dict[str, Version], Product]:
    """Look up every table the recipe names at its DVC revision and copy them aside; the base's own text has none.

    Raises:
        CalibrationError: if a table or the revision does not exist, or a table is not what it is read as.
        RecipeError: if the name of a held-out source cannot be recorded.
    """
    evaluation = recipe.evaluation
    paths = [recipe.calibration.path] if recipe.calibration.path != BASE_TEXT else []
    paths += [p for p in (evaluation.text, evaluation.overlap_index) if p is not None]
    if evaluation.tasks:
        paths += [p for p in (evaluation.tasks_folder, evaluation.include_path) if p is not None]
    versions = resolve_versions(place, paths, recipe.calibration.rev)
    if recipe.alignment.enabled:
        versions |= _resolve_table(place, recipe.alignment, "alignment", versions)
    if recipe.heal.mode != "off":
        versions |= _resolve_table(place, recipe.heal, "heal", versions)
    copies = copy_tables(place, versions)
    _ask_tables(recipe, Tables(versions, copies, None))
    return versions, copies


def _resolve_table(
    place: Workplace, settings: AlignmentSettings | HealSettings, section: str, others: Mapping[str, Version]
) -> dict[str, Version]:
    if settings.path == BASE_TEXT:
        return {}
    found = resolve_versions(place, [settings.path], settings.rev, f"{section}.rev")
    other = others.get(str(settings.path))
    if other is not None and found[str(settings.path)] != other:
        raise CalibrationError(
            f"{section} table {settings.path} is read at another revision too; give both the same revision"
        )
    return found


def _ask_tables(recipe: Recipe, tables: Tables) -> None:
    """Read every table once, before anything is computed on one of them."""
    evaluation = recipe.evaluation
    sections: list[Any] = [recipe.calibration]
    sections += [recipe.alignment] if recipe.alignment.enabled else []
    sections += [recipe.heal] if recipe.heal.mode != "off" else []
    for path in [section.path for section in sections if section.path != BASE_TEXT]:
        read_rows(tables.find(path).read_bytes(), str(path))
    if evaluation.overlap_index is not None:
        read_index(tables.find(evaluation.overlap_index), evaluation.overlap_index)
    if evaluation.text is not None:
        rows = read_rows(tables.find(evaluation.text).read_bytes(), str(evaluation.text))
        refuse_source_names(dict.fromkeys(row["source"] for row in rows), str(evaluation.text))


def read_index(file: Path, path: Path) -> list[dict[str, Any]]:
    """Read the texts that evaluation uses, which calibration must not.

    Args:
        file: the table.
        path: how the recipe names it.

    Raises:
        CalibrationError: if it cannot be read, or a row lacks a column.
    """
    rows = read_rows(file.read_bytes(), str(path))
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in INDEX_COLUMNS if row.get(name) in (None, "")]:
            raise CalibrationError(
                f"evaluation.overlap_index {path}, row {number}: nothing in {', '.join(missing)}; a row has "
                f"{', '.join(INDEX_COLUMNS)}; {suggest_table()}"
            )
    return rows
