"""A first recipe for a model, after looking at its headers and at what is here; and what it would take."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka.alignment.table import AlignmentTable
from mka.errors import MkaError, RecipeError
from mka.evaluation.task_tables import TASKS, list_tables
from mka.methods import resolve_method
from mka.model.checkpoint import Checkpoint
from mka.model.config import build_config
from mka.pipeline.evaluate import EVALUATE, SPEED
from mka.pipeline.foresee import estimate_observing
from mka.pipeline.heal import HEAL
from mka.pipeline.inputs import Inputs
from mka.pipeline.job import Job
from mka.pipeline.merge import MERGE
from mka.pipeline.recipes import validate_recipe
from mka.plan.target import Aim
from mka.recipe import (
    BASE_TEXT,
    AlignmentSettings,
    CalibrationSettings,
    EvaluationSettings,
    GateSettings,
    HealSettings,
    MethodChoice,
    ModelSource,
    QuantizeSettings,
    Recipe,
    Target,
)
from mka.transforms import get_quantizer
from mka.transforms.rewrite import refuse_quantized

# Share of the layers that a first try takes out; more need more healing than a first try has.
REMOVED = 1 / 6
# Weights that share a scale, the best choice first.
GROUPS = (64, 32, 16)
# Items of each benchmark whose table is here: enough to see a collapse, few enough for two cores.
ITEMS = 40


def draft_recipe(base: Checkpoint, source: ModelSource, memory: int) -> Recipe:
    """Put a recipe together that this model and this machine can do.

    A sixth of the layers is taken out by the default method, refitted and healed; the tables are the project's own
    where they are here, else the base's own text. Windows are no longer than the model reads, groups of weights are of
    a size that divides its widths, and healing takes no more memory than there is.

    Args:
        base: opened by its headers at least.
        source: how it is called.
        memory: bytes that a run may have.

    Raises:
        CheckpointError: if the model is quantized already.
        RecipeError: if it has one layer only.
    """
    refuse_quantized(base)
    if base.layers < 2:
        raise RecipeError(f"{source.label} has {base.layers} layer, and none can go")
    layers = base.layers - max(1, round(base.layers * REMOVED))
    target = Target(layers=layers)
    protected = {"protect_first": target.protect_first, "protect_last": target.protect_last}
    if sum(protected.values()) > layers:
        protected = dict.fromkeys(protected, 0)
    positions = build_config(base.config, base.path).max_position_embeddings
    read, aligned, healed, measured, gate = (
        CalibrationSettings(),
        AlignmentSettings(),
        HealSettings(),
        EvaluationSettings(),
        GateSettings(),
    )
    raw: dict[str, Any] = {
        "name": name_recipe(source),
        "model": source.model_dump(exclude_defaults=True),
        "calibration": {"path": find_table(read.path), "samples": read.samples},
        "method": {"name": MethodChoice().name},
        "target": {"layers": layers, **protected},
        "alignment": {"enabled": True, "path": find_table(aligned.path), "tokens": aligned.tokens},
        "heal": {"mode": "distil", "path": find_table(healed.path), "tokens": healed.tokens},
        "quantize": choose_rounding(base),
        "evaluation": {"text": find_table(measured.text, None), "tasks": list_measured(measured.tasks_folder)},
        "gate": {"perplexity_recovery": gate.perplexity_recovery, "task_recovery": gate.task_recovery},
    }
    for name, settings in (("alignment", aligned), ("heal", healed), ("evaluation", measured)):
        raw[name]["context"] = min(settings.context, positions)
    recipe = validate_recipe(raw, "draft")
    needed = foresee_memory(base, recipe)
    modes = [mode for mode in ("distil", "local") if needed[f"heal ({mode})"] <= memory]
    return recipe.model_copy(update={"heal": recipe.heal.model_copy(update={"mode": next(iter(modes), "off")})})


def find_table(path: Path | None, otherwise: Path | None = BASE_TEXT) -> Path | None:
    """Return a table of the project that is read if nothing is said; what stands in its place if it is not here."""
    return path if path is not None and path.is_file() else otherwise


def list_measured(folder: Path | None) -> dict[str, int]:
    """Return the benchmarks whose tables are in a folder, with some items of each."""
    return {task: ITEMS for task in TASKS if folder is not None and list_tables(folder, task)}


def choose_rounding(base: Checkpoint) -> dict[str, Any]:
    """Return settings of 8 bits in groups that divide the model's widths; none where it cannot be rounded."""
    for size in GROUPS:
        settings = {"scheme": "int8", "group_size": size}
        try:
            asked = QuantizeSettings(**settings)
            get_quantizer(asked).check(base, asked)
        except MkaError:
            continue
        return settings
    return {"scheme": "off"}


def name_recipe(source: ModelSource) -> str:
    """Return a name for what is made of a model, as recipes and registries spell names."""
    last = re.sub(r"==.*|@.*", "", source.label.rstrip("/")).rpartition("/")[2]
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("._-") or "model"


def foresee_memory(base: Checkpoint, recipe: Recipe) -> Mapping[str, int]:
    """Return the bytes that each demanding stage of a recipe holds at its peak, beside Python and its libraries.

    By arithmetic from headers, as a dry run has them; texts are taken to be as long as they may be.

    Returns:
        stage -> bytes; of healing for each of its modes.
    """
    aligned, read = recipe.alignment, recipe.calibration
    table = AlignmentTable({}, aligned, {"": aligned.tokens // aligned.context})
    planner = resolve_method(recipe.method)
    layers = recipe.target.layers or base.layers
    inputs = Inputs(alignment=table, heldout={"": ("",)})
    job = Job(recipe, planner, base, "", Aim(layers), inputs)
    found = {
        "observe": estimate_observing(job, [read.max_tokens] * read.samples),
        "align": MERGE.foresee(job).memory,
    }
    for mode in ("distil", "local"):
        healed = recipe.model_copy(update={"heal": recipe.heal.model_copy(update={"mode": mode})})
        found[f"heal ({mode})"] = HEAL.foresee(Job(healed, planner, base, "", Aim(layers), inputs)).memory
    # Speeds are compared with the models side by side.
    return found | {"evaluate": max(EVALUATE.foresee(job).memory, SPEED.foresee(job).memory)}
