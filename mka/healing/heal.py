"""One healing, of whichever kind: a model and its base to a stock folder and the facts of the training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mka.healing.table import HealingTable, HealingWindows, cut_healing
from mka.model.checkpoint import Checkpoint
from mka.model.verification import verify_checkpoint
from mka.recipe import HealSettings, ModelSource
from mka.terminal import show_progress
from mka.transforms.rewrite import replace_tensors


def heal_checkpoint(
    base: Checkpoint,
    student: Checkpoint,
    ends: Sequence[int],
    table: HealingTable,
    settings: HealSettings,
    source: ModelSource,
    output: Path,
    scratch: Path,
    *,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Heal a model, verify it with a stranger's loader, publish.

    Args:
        base: what it was made of.
        student: the model; unquantized.
        ends: the base's layer whose output each of its layers answers for, of `mka.alignment.lockstep.find_ends`; of
            use for `local` alone.
        table: texts.
        settings: mode, not "off", and how.
        source: how the base is loaded.
        output: folder to publish.
        scratch: folder for what a run that is killed goes on from.
        seed: of everything random.

    Returns:
        What the loader found, and the facts of the healing.

    Raises:
        CalibrationError: if there is too little text.
        RecipeError: if windows are longer than the model reads, or no source can be left out.
        CheckpointError: if the student cannot follow this base or equals it, or the folder does not load whole.
        PlanError: if the layers have parts that cannot be healed.
        NumericsError: if the training diverges.
        OutputError: if it cannot be written.
    """
    windows = cut_healing(table, base)
    facts = {"mode": settings.mode} | _describe_windows(windows)
    from mka.healing.distil import distil

    made = distil(base, student, windows, settings, source, scratch, seed=seed)
    with show_progress("write healed", student.nbytes, "B", scale=True) as advance:
        found = replace_tensors(student, made.tensors, output, verify=verify_checkpoint, on_tensor=advance)
    return found, {**facts, **made.facts}


def _describe_windows(windows: HealingWindows) -> dict[str, Any]:
    return {
        "windows": dict(windows.windows),
        "context": windows.train.shape[1],
        "heldout_source": windows.source,
        "heldout_tokens": windows.heldout.numel(),
    }
