"""The calibration set: read at a DVC revision, guarded, kept apart from everything evaluation uses."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.alignment.table import AlignmentTable, fit_windows, open_alignment
from mka.evaluation.catalog import Catalog
from mka.evaluation.task_tables import is_built_in
from mka.healing.table import HealingTable, cut_healing, open_healing
from mka.methods import resolve_method
from mka.model.checkpoint import Checkpoint
from mka.pipeline.inputs import Inputs, list_read, read_measured
from mka.pipeline.written import as_own_text, want_text, write_table
from mka.recipe import Measurement, Recipe
from mka.store.products import Product, produce, reading
from mka.texts.calibration import load_calibration
from mka.texts.overlap import refuse_overlap
from mka.texts.rows import format_rows, read_heldout, read_rows
from tasks.guards import guard
from tasks.guards.texts import (
    calibration_suite,
    calibration_table,
    evaluation_table,
    evaluation_texts_suite,
    heldout_suite,
    heldout_table,
)
from tasks.machine.workplace import Workplace
from tasks.tables import Tables, read_index
from tasks.versioned import Version

VERSION = 2
CALIBRATION_FILE, TABLE_FILE = "calibration.jsonl", "table.jsonl"


@task(task_run_name="text of {recipe.model.label}", cache_policy=NO_CACHE)
def write_own_text(place: Workplace, recipe: Recipe, base: Checkpoint) -> Product | None:
    """Let the base write the tables that a recipe calls ``base``; None if it names others.

    Raises:
        CalibrationError: if nearly nothing it writes is usable.
    """
    read = list_read(recipe, resolve_method(recipe.method)) | {"calibration": recipe.calibration}
    wanted = want_text(**read, seed=recipe.seed)
    return write_table(base, recipe.model, wanted, place.stages) if wanted is not None else None


@task(task_run_name="calibration set of {recipe.calibration.samples} texts", cache_policy=NO_CACHE)
def select_calibration(
    place: Workplace,
    recipe: Recipe,
    versions: Mapping[str, Version],
    copies: Product,
    own_text: Product | None,
    run: str,
) -> Product:
    """Take the calibration texts, after the guards of all tables.

    Raises:
        GuardError: if a table breaks an expectation, e.g. a calibration text that evaluation uses.
        CalibrationError: if a table cannot be read or holds too few texts.
    """
    settings, evaluation = recipe.calibration, recipe.evaluation
    tables = Tables(versions, copies, own_text)

    def make(folder: Path) -> Mapping[str, Any]:
        chosen = load_calibration(tables.find(settings.path), settings.samples, path=str(settings.path))
        claimed, evaluation_texts = _read_evaluation(place, recipe, tables, run)
        guard.check(
            "calibration",
            calibration_table(chosen.texts, chosen.sources, claimed),
            calibration_suite(settings.samples),
            place.checks,
            run,
        )
        # The guard compares whole texts by hash; this also finds an evaluation text inside a longer one.
        refuse_overlap(chosen.texts, evaluation_texts)
        lines = [json.dumps({"source": s, "text": t}, ensure_ascii=False) for s, t in zip(chosen.sources, chosen.texts)]
        (folder / CALIBRATION_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"digest": chosen.digest, "texts": len(chosen.texts), "sources": sorted(set(chosen.sources))}

    keyed = {"samples": settings.samples, "tasks": sorted(evaluation.tasks)}
    used = tables.digest(recipe, "calibration", settings.path)
    return produce(place.stages, "calibration", version=VERSION, settings=keyed, inputs=used, make=make)


@task(task_run_name="alignment table of {recipe.alignment.tokens} tokens", cache_policy=NO_CACHE)
def select_alignment(
    place: Workplace,
    recipe: Recipe,
    base: Checkpoint,
    versions: Mapping[str, Version],
    copies: Product,
    own_text: Product | None,
    run: str,
) -> Product:
    """Take the texts that merged layers are refitted on, after the guards of all tables.

    Raises:
        GuardError: if a table breaks an expectation, e.g. an alignment text that evaluation uses.
        CalibrationError: if a table cannot be read, or is too short.
        RecipeError: if it has no source to leave out.
    """
    settings = recipe.alignment

    def choose(file: Path, measured: list[str]) -> dict[str, Any]:
        chosen = fit_windows(open_alignment(file, settings, measured), base)
        return {"digest": chosen.digest, "windows": dict(chosen.windows)}

    keyed = settings.model_dump(include={"tokens", "context", "copies", "penalty", "heldout_source"})
    tables = Tables(versions, copies, own_text)
    return _select(place, recipe, base, tables, run, "alignment", settings.path, keyed, choose)


@task(task_run_name="healing table of {recipe.heal.tokens} tokens", cache_policy=NO_CACHE)
def select_healing(
    place: Workplace,
    recipe: Recipe,
    base: Checkpoint,
    versions: Mapping[str, Version],
    copies: Product,
    own_text: Product | None,
    run: str,
) -> Product:
    """Take the texts that the merged model is healed on, after the guards of all tables.

    Raises:
        GuardError: if a table breaks an expectation, e.g. a text that evaluation uses.
        CalibrationError: if a table cannot be read, or is too short.
        RecipeError: if it has no source to leave out.
    """
    settings = recipe.heal

    def choose(file: Path, measured: list[str]) -> dict[str, Any]:
        chosen = open_healing(file, settings, measured)
        return {"digest": chosen.digest, "windows": dict(cut_healing(chosen, base).windows)}

    keyed = settings.model_dump(include={"tokens", "context", "heldout_source", "heldout_tokens"})
    tables = Tables(versions, copies, own_text)
    return _select(place, recipe, base, tables, run, "healing", settings.path, keyed, choose)


def _select(
    place: Workplace,
    recipe: Recipe,
    base: Checkpoint,
    tables: Tables,
    run: str,
    kind: str,
    named: Path,
    keyed: Mapping[str, Any],
    choose: Callable[[Path, list[str]], Mapping[str, Any]],
) -> Product:
    """Guard a table of texts by source and take it over; ``choose(file, evaluation texts)`` says what is in it."""
    used = tables.digest(recipe, kind, named) | {"base": base.digest}

    def make(folder: Path) -> Mapping[str, Any]:
        claimed, evaluation_texts = _read_evaluation(place, recipe, tables, run)
        file = tables.find(named)
        rows = read_rows(file)
        texts, sources = [row["text"] for row in rows], [row["source"] for row in rows]
        guard.check(kind, calibration_table(texts, sources, claimed), calibration_suite(1), place.checks, run)
        facts = choose(file, evaluation_texts)
        # Rows and not the file: one of plain text has another name.
        (folder / TABLE_FILE).write_text(format_rows(rows), encoding="utf-8")
        return {"texts": len(texts), **facts}

    settings = {**keyed, "tasks": sorted(recipe.evaluation.tasks)}
    return produce(place.stages, kind, version=VERSION, settings=settings, inputs=used, make=make)


def _read_evaluation(place: Workplace, recipe: Recipe, tables: Tables, run: str) -> tuple[dict[str, str], list[str]]:
    """Guard and read what evaluation uses; returns digest -> task or source, and the texts."""
    evaluation = recipe.evaluation
    claimed: dict[str, str] = {}
    used: list[str] = []
    if evaluation.overlap_index is not None:
        rows = read_index(tables.find(evaluation.overlap_index), evaluation.overlap_index)
        guard.check(
            "evaluation_texts",
            evaluation_table(rows),
            evaluation_texts_suite(sorted({*evaluation.tasks, *(row["task"] for row in rows)})),
            place.checks,
            run,
        )
        claimed |= {row["text_sha256"]: row["task"] for row in rows}
        used += [row["text"] for row in rows]
    if evaluation.text is not None:
        heldout = read_heldout(tables.find(evaluation.text))
        texts = [text for group in heldout.values() for text in group]
        sources = [name for name, group in heldout.items() for _ in group]
        table = heldout_table(texts, sources)
        guard.check("heldout", table, heldout_suite(), place.checks, run)
        claimed |= dict(zip(table["text_sha256"], sources))
        used += texts
    # Of these alone there is an index.
    if others := [task for task in evaluation.tasks if not is_built_in(task)]:
        catalog = _find_catalog(evaluation, tables)
        for name in catalog.expand(dict.fromkeys(others)):
            used += catalog.read_texts(name)
    return claimed, used


def _find_catalog(evaluation: Measurement, tables: Tables) -> Catalog:
    places = (evaluation.tasks_folder, evaluation.include_path)
    return Catalog(*(tables.find(path) if path is not None else None for path in places))


def open_inputs(recipe: Recipe, tables: Tables, chosen: Mapping[str, Product]) -> Inputs:
    """Read what a job reads: from the private copies, and from what the guards let through.

    Args:
        recipe: the recipe.
        tables: where its texts are read from.
        chosen: of "calibration", "alignment" and "healing" those that there are.

    Raises:
        RecipeError: on an unknown task or a missing table.
        StoreError: if one of them has changed since it was copied or chosen.
    """
    text = tables.find(recipe.evaluation.text) if recipe.evaluation.text is not None else None
    catalog = _find_catalog(recipe.evaluation, tables) if recipe.evaluation.tasks else Catalog()
    found: dict[str, Any] = {}
    with reading():
        if (product := chosen.get("calibration")) is not None:
            found["calibration"] = load_calibration(product.open() / CALIBRATION_FILE, product.facts["texts"])
        if (product := chosen.get("alignment")) is not None:
            texts = read_heldout(product.open() / TABLE_FILE)
            found["alignment"] = AlignmentTable(texts, recipe.alignment, product.facts["windows"])
        if (product := chosen.get("healing")) is not None:
            found["healing"] = HealingTable(read_heldout(product.open() / TABLE_FILE), recipe.heal)
        if tables.own_text is not None:
            found["own_text"] = as_own_text(tables.own_text)
        return replace(read_measured(recipe.evaluation, text, catalog), **found)
