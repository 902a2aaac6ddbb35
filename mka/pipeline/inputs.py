"""The texts and tables of one job: read, checked, kept apart, digested."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mka.alignment.table import AlignmentTable, open_alignment
from mka.errors import CalibrationError, RecipeError, StoreError
from mka.evaluation.catalog import Catalog, open_catalog
from mka.healing.table import HealingTable, open_healing
from mka.methods import Planner
from mka.model.checkpoint import Checkpoint
from mka.outside.project import suggest_table
from mka.pipeline.written import OwnText, locate_table, refuse_used, want_text
from mka.recipe import BASE_TEXT, Measurement, Recipe
from mka.texts.calibration import CalibrationSet, load_calibration
from mka.texts.overlap import refuse_overlap
from mka.texts.positions import check_context
from mka.texts.rows import digest_sources, digest_texts, read_heldout, read_rows, read_texts
from mka.texts.writing import Wanted
from mka.transforms import CALIBRATION, list_needs


@dataclass(frozen=True)
class Inputs:
    """What a job reads beside its model.

    Attributes:
        calibration: what the method may look at; None if it looks at nothing.
        alignment: what merging is fitted on; None if it is not.
        healing: what the merged model is healed on; None if it is not.
        heldout: source -> texts of perplexity; empty if there are none.
        tasks: task -> number of items (None: all); empty if none is measured.
        catalog: where the tasks are from.
        digests: what evaluation reads, by name; "heldout" and one "task NAME" each.
        generation: items of copying, retrieval and repetition each; 0 if they are not measured.
        own_text: what the base wrote itself, if a table is that; already read into those above.
    """

    calibration: CalibrationSet | None = None
    alignment: AlignmentTable | None = None
    healing: HealingTable | None = None
    heldout: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tasks: Mapping[str, int | None] = field(default_factory=dict)
    catalog: Catalog = field(default_factory=Catalog)
    digests: Mapping[str, str] = field(default_factory=dict)
    generation: int = 0
    own_text: OwnText | None = None

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure a model on."""
        return bool(self.heldout or self.tasks or self.generation)

    @property
    def knows_calibration(self) -> bool:
        """Whether the calibration texts are there, not only such as stand in for what the base has yet to write."""
        return self.calibration is not None and not (self.own_text and self.own_text.foreseen)

    def refuse_marks(self, marks: Sequence[str]) -> None:
        """Refuse texts that hold marks which a model has no embedding for.

        Raises:
            CalibrationError: naming table and mark.
        """
        tables: list[tuple[str, Sequence[str]]] = list(self.heldout.items())
        tables += [("calibration", self.calibration.texts)] if self.calibration else []
        for fitted in (self.alignment, self.healing):
            tables += fitted.texts.items() if fitted else []
        for mark in marks:
            if (
                name := next((name for name, texts in tables if any(mark in text for text in texts)), None)
            ) is not None:
                raise CalibrationError(
                    f"{name}: a text holds {mark!r}, and the base's embedding has no row for that token; take it out"
                )


def reads_calibration(recipe: Recipe, planner: Planner) -> bool:
    """Whether anything looks at the calibration texts."""
    return bool(planner.needs) or recipe.reads_calibration or CALIBRATION in list_needs(recipe)


def list_read(recipe: Recipe, planner: Planner) -> dict[str, Any]:
    """Return the sections whose tables of texts are read, by their names in the recipe."""
    used = {
        "calibration": reads_calibration(recipe, planner),
        "alignment": recipe.alignment.enabled,
        "heal": recipe.heal.mode != "off",
    }
    return {name: getattr(recipe, name) for name, read in used.items() if read}


def want_own_text(recipe: Recipe, planner: Planner) -> Wanted | None:
    """Return how much text the base has to write before a recipe's tables can be read; None if none is its own."""
    return want_text(**list_read(recipe, planner), seed=recipe.seed)


def check_named(recipe: Recipe, planner: Planner) -> None:
    """Read the tables that a recipe names, before the base writes the others.

    Raises:
        CalibrationError: if one cannot be read.
    """
    for path in {section.path for section in list_read(recipe, planner).values()} - {BASE_TEXT}:
        read_rows(path)


def read_inputs(recipe: Recipe, planner: Planner, *, evaluate: bool = True, own_text: OwnText | None = None) -> Inputs:
    """Read the tables a recipe names from the working copy, and those that are the base's own text.

    Raises:
        RecipeError: on an unknown task or a missing table.
        CalibrationError: if texts cannot be read, are too few, or are used by evaluation.
    """
    catalog = open_catalog(recipe.evaluation)
    measured = read_measured(recipe.evaluation, recipe.evaluation.text, catalog, evaluate)
    settings = recipe.calibration
    calibration, alignment = None, None
    if reads_calibration(recipe, planner):
        file = locate_table(settings.path, own_text)
        calibration = load_calibration(file, settings.samples, path=str(settings.path))
    used: list[str] = []
    healed = recipe.heal.mode != "off"
    if evaluate and (calibration is not None or recipe.alignment.enabled or healed or own_text is not None):
        used = [*(t for group in measured.heldout.values() for t in group), *_task_texts(recipe.evaluation, measured)]
    if own_text is not None:
        refuse_used(own_text, used)
    if calibration is not None:
        refuse_overlap(calibration.texts, used)
    if recipe.alignment.enabled:
        alignment = open_alignment(locate_table(recipe.alignment.path, own_text), recipe.alignment, used)
    healing = open_healing(locate_table(recipe.heal.path, own_text), recipe.heal, used) if healed else None
    return replace(measured, calibration=calibration, alignment=alignment, healing=healing, own_text=own_text)


def read_measured(settings: Measurement, text: Path | None, catalog: Catalog, evaluate: bool = True) -> Inputs:
    """Read and digest what base and candidate are measured on.

    Args:
        settings: names the tasks.
        text: the held-out table, wherever it is read from.
        catalog: the tasks, wherever their tables and definitions are read from.
        evaluate: whether anything is measured.

    Raises:
        RecipeError: on an unknown task or a missing table.
        CalibrationError: if the texts cannot be read.
    """
    if not evaluate:
        return Inputs()
    heldout = check_evaluation(settings, text, catalog)
    tasks = catalog.expand(settings.tasks)
    digests = {"heldout": digest_sources(heldout)} if heldout else {}
    digests |= {f"task {task}": digest_task(catalog, task, settings.shots) for task in tasks}
    return Inputs(
        heldout=heldout,
        tasks=tasks,
        catalog=catalog,
        digests=digests,
        generation=settings.generation,
    )


def check_evaluation(settings: Measurement, text: Path | None, catalog: Catalog) -> dict[str, list[str]]:
    """Read the held-out texts and check tasks and their tables; returns source -> texts.

    Refusals are those of `read_measured`.
    """
    tasks = catalog.expand(settings.tasks)
    catalog.check(tasks)
    for task in tasks:
        if any(map(catalog.reads_tables, catalog.find(task).tasks)) and not catalog.list_files(task):
            hint = suggest_table("name the folder that has one, or `hub` (null in a recipe) for the hub's data sets")
            raise RecipeError(f"task {task!r}: no table in {catalog.folder}; {hint}")
    return read_heldout(text) if text is not None else {}


def check_measured(
    heldout: Mapping[str, Sequence[str]],
    settings: Measurement,
    base: Checkpoint,
    seed: int,
    trust_remote_code: bool = False,
) -> None:
    """Refuse, before anything is computed, windows that a model cannot read and texts that make too few of them.

    Args:
        heldout: source -> texts of perplexity.
        settings: length and number of windows, and of the items of generation.
        base: whose tokenizer cuts them.
        seed: draws the items.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        RecipeError: naming the source, or what is too long.
    """
    from mka.evaluation.generation import check_generation
    from mka.model.loading import load_tokenizer
    from mka.texts.windows import cut_windows

    if not heldout and not settings.generation:
        return
    check_context(settings.context, base.config.get("max_position_embeddings"))
    tokenizer = load_tokenizer(base.path, trust_remote_code)
    if settings.generation:
        check_generation(tokenizer, settings, seed)
    for name, texts in heldout.items():
        cut_windows(tokenizer, texts, name=name, context=settings.context, max_tokens=settings.text_tokens)


def digest_task(catalog: Catalog, task: str, shots: int | None) -> str:
    """Digest what decides the score of one task: tables, those of few-shot examples too, definitions and data sets."""
    return digest_texts(catalog.digest(task, shots))


@contextmanager
def hold_tables(inputs: Inputs, shots: int | None) -> Iterator[None]:
    """Compare the tables of tasks, which are read while they are measured, with their digests before and after a block.

    Args:
        inputs: of the job.
        shots: few-shot examples.

    Raises:
        StoreError: if a table is no longer what it was when the run began.
    """
    _verify_tables(inputs, shots)
    yield
    _verify_tables(inputs, shots)


def _verify_tables(inputs: Inputs, shots: int | None) -> None:
    for task in inputs.tasks:
        # Anew: what was read of definitions is remembered.
        catalog = Catalog(inputs.catalog.folder, inputs.catalog.include)
        if digest_task(catalog, task, shots) != inputs.digests[f"task {task}"]:
            raise StoreError(
                f"table or definition of task {task!r} in {catalog.place} has changed since the run began; nothing "
                "measured on it is kept, run again"
            )


def _task_texts(settings: Measurement, measured: Inputs) -> Iterator[str]:
    """Texts of the tasks that calibration must not contain."""
    if settings.overlap_index is not None and settings.overlap_index.is_file():
        yield from read_texts(settings.overlap_index)
    for task in measured.tasks:
        yield from measured.catalog.read_texts(task)
