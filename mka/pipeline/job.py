"""What one compression is about to do: everything checked and foreseen that needs no run of the model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mka.alignment.table import AlignmentTable, fit_windows, open_alignment
from mka.errors import CheckpointError, RecipeError
from mka.methods import check_alignment, find_needs
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.plan.target import Aim, resolve_target
from mka.recipe import EvaluationSettings, ModelSource, Recipe, Target
from mka.sources.fetch import materialize, resolve_revision
from mka.texts.calibration import CalibrationSet, load_calibration
from mka.texts.overlap import refuse_overlap
from mka.texts.rows import read_heldout, read_texts
from mka.transforms import get_quantizer

EVIDENCE = "evidence"


@dataclass(frozen=True)
class Job:
    """One compression with everything checked that can be checked without running the model.

    Attributes:
        recipe: the resolved recipe.
        base: the opened base checkpoint.
        revision: what pins the base.
        aim: the target in layers.
        calibration: the texts the method looks at; None if it looks at none.
        heldout: source -> texts of perplexity; empty if there are none.
        measured: whether base and candidate are evaluated.
        alignment: what merging is fitted on; None if it is not.
    """

    recipe: Recipe
    base: Checkpoint
    revision: str
    aim: Aim
    calibration: CalibrationSet | None
    heldout: Mapping[str, Sequence[str]]
    measured: bool
    alignment: AlignmentTable | None = None


def fetch_base(source: ModelSource, work: Path) -> tuple[Checkpoint, str]:
    """Bring a model here, open and check it; returns it with what pins it.

    Raises:
        CheckpointError: if it cannot be had, is damaged, inconsistent or unsupported.
    """
    folder = materialize(source, work)
    return open_checkpoint(folder), resolve_revision(source, folder)


def prepare(recipe: Recipe, work: Path, *, evaluate: bool = True) -> Job:
    """Check a recipe against its model and its tables; runs nothing.

    Args:
        recipe: the recipe; tables are read from the working copy.
        work: work folder, where models are fetched to.
        evaluate: whether base and candidate will be measured.

    Raises:
        MkaError: whatever is wrong, before anything is computed.
    """
    check_alignment(recipe.method, recipe.alignment.enabled)
    needs = find_needs(recipe.method)
    heldout: Mapping[str, Sequence[str]] = {}
    if evaluate:
        heldout = check_evaluation(recipe.evaluation)
    calibration = load_calibration(recipe.calibration.path, recipe.calibration.samples) if needs else None
    texts: list[str] = []
    if evaluate and (calibration is not None or recipe.alignment.enabled):
        texts = [*(t for group in heldout.values() for t in group), *_task_texts(recipe)]
    if calibration is not None:
        refuse_overlap(calibration.texts, texts)
    alignment = open_alignment(recipe.alignment.path, recipe.alignment, texts) if recipe.alignment.enabled else None
    base, revision = fetch_base(recipe.model, work)
    aim = check_feasible(recipe, base)
    positions = base.config.get("max_position_embeddings")
    if heldout and isinstance(positions, int) and recipe.evaluation.context > positions:
        raise RecipeError(
            f"evaluation.context is {recipe.evaluation.context}; the model has {positions} positions, lower the context"
        )
    if alignment is not None:
        alignment = fit_windows(alignment, base)
    measured = bool(heldout or (evaluate and recipe.evaluation.tasks))
    return Job(recipe, base, revision, aim, calibration, heldout, measured, alignment)


def check_evaluation(settings: EvaluationSettings) -> Mapping[str, Sequence[str]]:
    """Read the held-out texts and check tasks and their tables; returns source -> texts.

    Raises:
        RecipeError: on an unknown task or a missing table.
        CalibrationError: if the texts cannot be read.
    """
    from mka.evaluation.tasks import check_tasks

    check_tasks(settings.tasks)
    for task in settings.tasks:
        if settings.tasks_folder is not None and not _tables(settings.tasks_folder, task):
            raise RecipeError(
                f"task {task!r}: no table in {settings.tasks_folder}; `make data` builds the project's own tables"
            )
    return read_heldout(settings.text) if settings.text is not None else {}


def _tables(folder: Path, task: str) -> list[Path]:
    if task == "mmlu":
        return sorted((folder / task).glob("*.test.jsonl"))
    name = f"mmlu/{task.removeprefix('mmlu_')}.test.jsonl" if task.startswith("mmlu_") else f"{task}.jsonl"
    return [folder / name] if (folder / name).is_file() else []


def _task_texts(recipe: Recipe) -> Iterator[str]:
    """Texts of the tasks that calibration must not contain."""
    settings = recipe.evaluation
    if settings.overlap_index is not None and settings.overlap_index.is_file():
        yield from read_texts(settings.overlap_index)
    for table in (t for task in settings.tasks for t in _tables(settings.tasks_folder or Path(), task)):
        for line in table.read_text(encoding="utf-8").split("\n"):
            row = json.loads(line) if line.strip() else {}
            yield from (value for value in row.values() if isinstance(value, str))


def resolve_aim(target: Target, checkpoint: Checkpoint) -> Aim:
    """Turn a recipe's target into layers of this checkpoint.

    Raises:
        RecipeError: if the target is below 1, above the layer count, or out of reach.
    """
    layers_out = resolve_target(
        checkpoint.layers,
        checkpoint.layer_nbytes,
        checkpoint.nbytes,
        layers=target.layers,
        layer_ratio=target.layer_ratio,
        size_ratio=target.size_ratio,
    )
    return Aim(layers_out, target.protect_first, target.protect_last)


def check_feasible(recipe: Recipe, checkpoint: Checkpoint) -> Aim:
    """Refuse what cannot work with this checkpoint before anything expensive starts; returns the target in layers.

    Raises:
        RecipeError: if the target, the group size or a task cannot be had.
        CheckpointError: if the checkpoint is quantized already.
    """
    from mka.evaluation.tasks import check_tasks

    aim = resolve_aim(recipe.target, checkpoint)
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.path}: weights are already quantized; name the original model instead")
    if recipe.quantize.scheme != "off":
        get_quantizer(recipe.quantize.scheme).check(checkpoint, recipe.quantize)
    check_tasks(recipe.evaluation.tasks)
    return aim
