"""What a comparison needs, read and checked before anything is computed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mka.alignment.table import AlignmentTable
from mka.bench.parts import Bench
from mka.bench.recipe import BenchRecipe, TextSource
from mka.errors import CalibrationError, RecipeError
from mka.evaluation.task_tables import list_tables
from mka.methods import get_method, method_settings
from mka.pipeline.job import check_evaluation, check_feasible, fetch_base
from mka.texts.calibration import CalibrationSet, load_calibration
from mka.texts.overlap import refuse_overlap
from mka.texts.positions import check_context
from mka.texts.rows import digest_texts, read_heldout, read_rows, read_texts


def prepare(recipe: BenchRecipe, work: Path, *, root: Path = Path(), command: str = "") -> Bench:
    """Check a comparison against its model and its texts; runs nothing.

    Args:
        recipe: the recipe; tables are read from the working copy.
        work: work folder, where models are fetched to and parts are stored.
        root: where the recipe's relative paths start.
        command: what was typed, for the record.

    Raises:
        MkaError: whatever is wrong, before anything is computed.
    """
    recipe = _resolve_paths(recipe, root)
    texts, paragraphs = {}, {}
    for text in recipe.texts:
        texts[text.name], paragraphs[text.name] = _read_text(text)
    check_evaluation(recipe.evaluation)
    calibration, alignment = _read_calibration(recipe)
    tables = {"calibration": calibration.texts if calibration else ()}
    tables["alignment"] = tuple(text for group in alignment.values() for text in group)
    _refuse_overlap(recipe, tables, paragraphs)
    base, revision = fetch_base(recipe.model, work)
    for cell in recipe.cells:
        check_feasible(recipe.recipe_for(cell), base)
    check_context(recipe.evaluation.context, base.config.get("max_position_embeddings"))
    digests = {f"text {name}": digest_texts(body) for name, body in texts.items()}
    digests |= {f"task {task}": _digest_tables(recipe, task) for task in recipe.evaluation.tasks}
    digests["alignment"] = AlignmentTable(alignment, recipe.alignment).digest
    notes = {name: _count_near_copies(tables, body) for name, body in paragraphs.items()}
    return Bench(recipe, base, revision, calibration, alignment, texts, digests, notes, work, command)


def _resolve_paths(recipe: BenchRecipe, root: Path) -> BenchRecipe:
    def at_root(section: Any, *names: str) -> Any:
        paths = {name: getattr(section, name) for name in names}
        return section.model_copy(update={name: root / path for name, path in paths.items() if path is not None})

    return at_root(recipe, "output", "picture").model_copy(
        update={
            "model": at_root(recipe.model, "folder"),
            "calibration": at_root(recipe.calibration, "path"),
            "alignment": at_root(recipe.alignment, "path"),
            "evaluation": at_root(recipe.evaluation, "tasks_folder", "overlap_index"),
            "texts": tuple(at_root(text, "path") for text in recipe.texts),
        }
    )


def _read_text(text: TextSource) -> tuple[list[str], list[str]]:
    """Return what is measured, and the pieces that calibration must not contain."""
    if not text.path.is_file():
        origin = f": {text.origin}" if text.origin else "; `make data` builds the project's own tables"
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


def _read_calibration(recipe: BenchRecipe) -> tuple[CalibrationSet | None, Mapping[str, Sequence[str]]]:
    calibration, alignment = None, {}
    methods = [(get_method(e.name), method_settings(e.name, e.settings), e) for e in recipe.methods]
    if any(method.fit or method.needs(settings) for method, settings, _ in methods):
        calibration = load_calibration(recipe.calibration.path, recipe.calibration.samples)
    if any(cell.aligned for cell in recipe.cells):
        if fitted := [method.name for method, _, entry in methods if method.fit and True in entry.alignment]:
            raise RecipeError(f"method {fitted[0]!r} fits its own correction; alignment: true is for methods without")
        alignment = read_heldout(recipe.alignment.path)
    return calibration, alignment


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


def _digest_tables(recipe: BenchRecipe, task: str) -> str:
    from mka.store.sums import file_sha256

    folder = recipe.evaluation.tasks_folder
    if folder is None:
        return "hub"
    files = list_tables(folder, task, every=True, shots=recipe.evaluation.shots)
    return digest_texts(f"{file.name} {file_sha256(file)}" for file in files if file.is_file())


def _count_near_copies(tables: Mapping[str, Sequence[str]], texts: Sequence[str]) -> str:
    """Count the calibration texts that share a run of words with a measured one: allowed, but to be known."""
    from mka.corpora.sampling import keep_apart

    is_free = keep_apart(texts)
    counts = [f"{sum(not is_free(t) for t in body)} of {len(body)} {name}" for name, body in tables.items() if body]
    return f"{' and '.join(counts)} texts" if counts else "nothing: no text was calibrated on"
