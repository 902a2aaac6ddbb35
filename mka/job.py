"""What one compression is about to do: everything checked and foreseen that needs no run of the model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka import stages
from mka.alignment_table import AlignmentTable, estimate_memory, fit_windows, open_alignment
from mka.calibration import CalibrationSet, load_calibration, read_heldout, read_texts, refuse_overlap
from mka.checkpoint import Checkpoint, describe_checkpoint, open_checkpoint
from mka.errors import RecipeError
from mka.methods import HIDDEN_STATES, REOBSERVE, Aim, check_alignment, find_needs, get_method, resolve_method
from mka.quantize import BITS
from mka.recipe import EvaluationSettings, ModelSource, Recipe
from mka.sources import materialize, resolve_revision

EVIDENCE = "evidence"
# Tokenizer, configuration, card and report: what a folder holds beside its weights.
COMPANIONS_NBYTES = 64_000_000


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
    aim = stages.check_feasible(recipe, base)
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
    from mka.benchmarks import check_tasks

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


def foresee(job: Job, output: Path) -> dict[str, Any]:
    """Say what a compression would do, from facts and arithmetic alone.

    Returns:
        base and candidate (layers, parameters, bytes), tokens to observe and to align on, estimates of peak memory
        and disk in bytes, and the files that would be written.
    """
    from transformers import AutoTokenizer

    from mka.observe import tokenize

    recipe, base = job.recipe, job.base
    texts = job.calibration.texts if job.calibration else ()
    lengths: list[int] = []
    if texts:
        tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
        lengths = [len(ids) for ids in tokenize(tokenizer, texts, recipe.calibration.max_tokens)]
    total, merged = base.nbytes, _merged_nbytes(job)
    facts = describe_checkpoint(base)
    share = sum(base.layer_nbytes) / total
    layers_gone = 1 - job.aim.layers_out / base.layers
    return {
        "base": {key: facts[key] for key in ("path", "model_type", "layers", "parameters", "bytes", "dtype")},
        "candidate": {
            "layers": job.aim.layers_out,
            "parameters": round(facts["parameters"] * (1 - share * layers_gone)),
            "bytes": candidate_nbytes(job),
            "quantize": recipe.quantize.scheme,
        },
        "method": recipe.method.model_dump(),
        "calibration_texts": len(texts),
        "calibration_tokens": sum(lengths),
        "alignment": _foresee_alignment(job),
        "evaluated": job.measured,
        "memory_bytes": _memory_nbytes(job, lengths),
        "disk_bytes": merged + (candidate_nbytes(job) if recipe.quantize.scheme != "off" else 0) + COMPANIONS_NBYTES,
        "files": [str(output / name) for name in _file_names(job)],
    }


def _foresee_alignment(job: Job) -> dict[str, Any] | None:
    if job.alignment is None:
        return None
    method, table = job.recipe.method, job.alignment
    resolved, settings = resolve_method(method)
    memory = estimate_memory(table, job.base, job.recipe.model, resolved.competing(settings))
    return {"tokens": table.tokens, "windows": dict(table.windows), "memory_bytes": memory}


def _merged_nbytes(job: Job) -> int:
    mean = sum(job.base.layer_nbytes) / job.base.layers
    return round(job.base.nbytes - mean * (job.base.layers - job.aim.layers_out))


def candidate_nbytes(job: Job) -> int:
    """Estimate the bytes of the candidate's tensors: the mean layer, its linear weights rounded."""
    settings = job.recipe.quantize
    if settings.scheme == "off":
        return _merged_nbytes(job)
    saved = 0.0
    for tensor in (t for i in range(job.base.layers) for t in job.base.layer_tensors(i).values()):
        if len(tensor.shape) == 2:
            width = tensor.nbytes / tensor.parameters
            saved += tensor.parameters * (width - BITS[settings.scheme] / 8 - width / settings.group_size)
    return round(_merged_nbytes(job) - saved * job.aim.layers_out / job.base.layers)


def _memory_nbytes(job: Job, lengths: Sequence[int]) -> int:
    """Estimate the peak: the model once or twice, or one layer where it is only walked; states; a batch of logits."""
    recipe, config = job.recipe, job.base.config
    width = 4 if recipe.model.dtype == "float32" else 2
    needs, quantized = find_needs(recipe.method), recipe.quantize.scheme != "off"
    aligned = _foresee_alignment(job)
    if job.measured or quantized or needs - {HIDDEN_STATES} or get_method(recipe.method.name).fit:
        copies = 2 if REOBSERVE in needs or quantized else 1
        weights = copies * sum(t.parameters for t in job.base.tensors.values())
    else:
        layers = (job.base.layer_tensors(i).values() for i in range(job.base.layers))
        weights = (2 if aligned else 1) * max(sum(t.parameters for t in layer) for layer in layers)
    pooled = (job.base.layers + 1) * len(lengths) * config["hidden_size"] * 4
    states = 2 * sum(lengths) * config["hidden_size"] * width
    windows = min(recipe.evaluation.batch_size, 4) * width + 2 * 4
    logits = recipe.evaluation.context * config["vocab_size"] * windows if job.measured else 0
    return weights * width + pooled + states + logits + (aligned["memory_bytes"] if aligned else 0)


def _file_names(job: Job) -> list[str]:
    method = get_method(job.recipe.method.name)
    names = ["config.json", "model.safetensors", "README.md", "SHA256SUMS", f"{EVIDENCE}/recipe.yaml"]
    names += [f"{EVIDENCE}/plan.json", *([f"{EVIDENCE}/scores.json"] if method.score else [])]
    if method.fit and job.aim.layers_out < job.base.layers:
        names.append(f"{EVIDENCE}/plan.folds.safetensors")
    if job.alignment is not None:
        names.append(f"{EVIDENCE}/alignment.json")
    if job.measured:
        names += [f"{EVIDENCE}/{name}.json" for name in ("base", "candidate", "gate")]
    return [*names, f"{EVIDENCE}/report.html"]
