"""What a comparison needs, read and checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mka.alignment.table import AlignmentTable, fit_windows
from mka.bench.parts import Bench
from mka.bench.recipe import BenchRecipe, TextSource
from mka.errors import CalibrationError, RecipeError
from mka.evaluation.catalog import open_catalog
from mka.healing.table import HealingTable, cut_healing
from mka.methods import Planner, resolve_method
from mka.model.checkpoint import Checkpoint
from mka.outside.project import suggest_table
from mka.pipeline.inputs import Inputs, check_evaluation, check_measured, digest_task
from mka.pipeline.job import Job, Opened, fetch_base, open_job
from mka.pipeline.written import OwnText, locate_table, open_own_text, want_text
from mka.recipe import BASE_TEXT, MethodChoice
from mka.texts.calibration import load_calibration
from mka.texts.overlap import refuse_overlap
from mka.texts.rows import digest_texts, read_heldout, read_rows, read_texts
from mka.transforms import looks_at_texts


def prepare(recipe: BenchRecipe, work: Path, *, root: Path = Path(), write: bool = True, command: str = "") -> Bench:
    """Check a comparison against its model and its texts; runs nothing, but for a base that has to write texts first.

    Args:
        recipe: the recipe; tables are read from the working copy.
        work: work folder, where models are fetched to and parts are stored.
        root: where the recipe's relative paths start.
        write: as for `mka.pipeline.job.prepare`.
        command: what was typed, for the record.

    Raises:
        MkaError: whatever is wrong, before anything is computed.
    """
    recipe = _resolve_paths(recipe, root)
    texts, paragraphs = {}, {}
    for text in recipe.texts:
        texts[text.name], paragraphs[text.name] = _read_text(text)
    catalog = open_catalog(recipe.evaluation)
    check_evaluation(recipe.evaluation, None, catalog)
    asked = recipe.evaluation.model_copy(update={"tasks": catalog.expand(recipe.evaluation.tasks)})
    recipe = recipe.model_copy(update={"evaluation": asked})
    planners = {
        entry.row: resolve_method(MethodChoice(name=entry.name, settings=entry.settings)) for entry in recipe.methods
    }
    used = _list_read(recipe, planners)
    wanted = want_text(**used, seed=recipe.seed)
    if wanted is None:
        inputs, notes = _read_calibration(recipe, used, paragraphs)
    base, revision = fetch_base(recipe.model, work)
    check_measured(texts, recipe.evaluation, base, recipe.seed, recipe.model.trust_remote_code)
    if wanted is not None:
        with open_own_text(base, recipe.model, wanted, work / "stages", write=write) as own_text:
            inputs, notes = _read_calibration(recipe, used, paragraphs, own_text)
    if inputs.alignment is not None:
        fit_windows(inputs.alignment, base)  # refuses what the fit itself would refuse later
    opened = Opened(keep=True)
    jobs = _open_jobs(recipe, planners, base, revision, inputs, opened)
    digests = {f"text {name}": digest_texts(body) for name, body in texts.items()}
    settings = recipe.evaluation
    digests |= {f"task {task}": digest_task(catalog, task, settings.shots) for task in settings.tasks}
    return Bench(recipe, base, revision, inputs, texts, digests, notes, work, command, jobs, opened)


def _resolve_paths(recipe: BenchRecipe, root: Path) -> BenchRecipe:
    def at_root(section: Any, *names: str) -> Any:
        paths = {name: getattr(section, name) for name in names}
        return section.model_copy(update={name: root / path for name, path in paths.items() if path is not None})

    return at_root(recipe, "output", "picture").model_copy(
        update={
            "model": at_root(recipe.model, "folder"),
            **{
                name: section if section.path == BASE_TEXT else at_root(section, "path")
                for name in ("calibration", "alignment", "heal")
                for section in (getattr(recipe, name),)
            },
            "evaluation": at_root(recipe.evaluation, "tasks_folder", "include_path", "overlap_index"),
            "texts": tuple(at_root(text, "path") for text in recipe.texts),
        }
    )


def _read_text(text: TextSource) -> tuple[list[str], list[str]]:
    """Return what is measured, and the pieces that calibration must not contain."""
    if not text.path.is_file():
        origin = f": {text.origin}" if text.origin else f"; {suggest_table()}"
        raise CalibrationError(f"text {text.name!r}: there is no file {text.path}{origin}")
    rows = read_rows(text.path)
    if text.path.suffix == ".txt":
        return [text.path.read_text(encoding="utf-8")], [row["text"] for row in rows]
    chosen = [row["text"] for row in rows if text.source in (None, row["source"])]
    if not chosen:
        sources = sorted({row["source"] for row in rows})
        raise CalibrationError(
            f"text {text.name!r}: {text.path} has no rows of source {text.source!r}; sources: {', '.join(sources)}"
        )
    return chosen, chosen


def _list_read(recipe: BenchRecipe, planners: Mapping[str, Planner]) -> dict[str, Any]:
    """Return the sections whose tables of texts are read, by their names in the recipe."""
    used: dict[str, Any] = {}
    rounded = any(looks_at_texts(cell.rounded) for cell in recipe.cells)
    if rounded or any(planner.needs or planner.reads_texts for planner in planners.values()):
        used["calibration"] = recipe.calibration
    if any(cell.aligned for cell in recipe.cells):
        fitted = [e.name for e in recipe.methods if planners[e.row].method.fit and True in e.alignment]
        if fitted:
            raise RecipeError(f"method {fitted[0]!r} fits its own correction; alignment: true is for methods without")
        used["alignment"] = recipe.alignment
    if amounts := [cell.healed for cell in recipe.cells if cell.healed]:
        used["heal"] = recipe.heal.model_copy(update={"tokens": max(amounts)})
    return used


def _read_calibration(
    recipe: BenchRecipe,
    used: Mapping[str, Any],
    measured: Mapping[str, Sequence[str]],
    own_text: OwnText | None = None,
) -> tuple[Inputs, dict[str, str]]:
    """Return the texts that methods, refits and healing look at, and per measured text a note on near-copies there."""
    calibration, alignment, healing, settings = None, None, None, recipe.calibration
    if "calibration" in used:
        file = locate_table(settings.path, own_text)
        calibration = load_calibration(file, settings.samples, path=str(settings.path))
    if "alignment" in used:
        alignment = AlignmentTable(read_heldout(locate_table(recipe.alignment.path, own_text)), recipe.alignment)
    if "heal" in used:
        healing = HealingTable(read_heldout(locate_table(recipe.heal.path, own_text)), recipe.heal)
    tables: dict[str, Sequence[str]] = {"calibration": calibration.texts if calibration else ()}
    for kind, table in (("alignment", alignment), ("healing", healing)):
        tables[kind] = tuple(text for group in table.texts.values() for text in group) if table else ()
    _refuse_overlap(recipe, tables, measured)
    notes = {name: _count_near_copies(tables, body) for name, body in measured.items()}
    return Inputs(calibration, alignment, healing), notes


def _open_jobs(
    recipe: BenchRecipe,
    planners: Mapping[str, Planner],
    base: Checkpoint,
    revision: str,
    inputs: Inputs,
    opened: Opened,
) -> dict[str, Job]:
    """One job per cell; those of one method share what is opened while planning."""
    jobs = {}
    for cell in recipe.cells:
        plain, planner = recipe.recipe_for(cell), planners[cell.entry.row]
        table = replace(inputs.alignment, settings=plain.alignment) if cell.aligned and inputs.alignment else None
        healing = replace(inputs.healing, settings=plain.heal) if cell.healed and inputs.healing else None
        if healing is not None:
            cut_healing(healing, base)  # refuses what healing itself would refuse later
        used = replace(inputs, alignment=table, healing=healing)
        jobs[cell.key] = open_job(plain, planner, base, revision, used, opened=opened)
    return jobs


def _refuse_overlap(
    recipe: BenchRecipe, tables: Mapping[str, Sequence[str]], measured: Mapping[str, Sequence[str]]
) -> None:
    index = recipe.evaluation.overlap_index
    if recipe.evaluation.tasks and index is not None and index.is_file():
        measured = {**measured, "the tasks": read_texts(index)}
    for table, texts in tables.items():
        for name, used in measured.items():
            try:
                refuse_overlap(texts, used)
            except CalibrationError as error:
                raise CalibrationError(f"text {name!r} and the {table} table: {error}") from None


def _count_near_copies(tables: Mapping[str, Sequence[str]], texts: Sequence[str]) -> str:
    """Count the calibration texts that share a run of words with a measured one: allowed, but to be known."""
    from mka.corpora.sampling import keep_apart

    is_free = keep_apart(texts)
    counts = [f"{sum(not is_free(t) for t in body)} of {len(body)} {name}" for name, body in tables.items() if body]
    return f"{' and '.join(counts)} texts" if counts else "nothing: no text was calibrated on"
