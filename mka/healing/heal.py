"""One healing, of whichever kind: a model and its base to a stock folder and the facts of the training."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mka.healing.student import check_student, count_shared, measure_divergence
from mka.healing.table import HealingTable, HealingWindows, cut_healing
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.recipe import HealSettings, ModelSource
from mka.terminal import show_progress
from mka.transforms.rewrite import replace_tensors


def key_healing(settings: HealSettings, dtype: str, seed: int) -> dict[str, Any]:
    """Return what of the settings decides the result, with the version of the code that makes it.

    Args:
        settings: mode, not "off", and how.
        dtype: precision of the base's forward passes.
        seed: of everything random.
    """
    from mka.healing import distil, local

    version = (local if settings.mode == "local" else distil).VERSION
    keyed = settings.model_dump(exclude={"path", "rev", "checkpointing"})
    return keyed | {"dtype": dtype, "seed": seed, "version": version}


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
    check_student(base, student)
    shared = count_shared(base, student)
    facts: dict[str, Any] = {"mode": settings.mode} | _describe_windows(windows)
    if settings.mode == "local":
        found, made = _heal_locally(base, student, ends, windows, settings, source, output, seed)
        return found, facts | made
    from mka.healing.distil import distil

    done = distil(base, student, windows, settings, source, scratch, shared=shared, seed=seed)
    with show_progress("write healed", student.nbytes, "B", scale=True) as advance:
        found = replace_tensors(student, done.tensors, output, verify=verify_checkpoint, on_tensor=advance)
    return found, {**facts, **done.facts}


def _heal_locally(
    base: Checkpoint,
    student: Checkpoint,
    ends: Sequence[int],
    windows: HealingWindows,
    settings: HealSettings,
    source: ModelSource,
    output: Path,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    from mka.healing.folder import write_healed
    from mka.healing.local import RATE, heal_locally
    from mka.model.loading import open_decoder

    started, layers = time.perf_counter(), []
    options = (source.dtype, source.trust_remote_code)
    with open_decoder(base, *options) as (teacher, _):
        with open_decoder(student, *options) as (pupil, _):
            before = measure_divergence(teacher, pupil, windows.heldout)
            total = base.layers * windows.train.numel()
            with show_progress("heal layers", total, "tok") as advance:

                def tensors() -> Iterator[Mapping[str, Any]]:
                    pair = (teacher, pupil, ends, windows.train, windows.heldout, settings)
                    for healed in heal_locally(*pair, seed=seed, on_tokens=advance):
                        layers.append(dict(healed.facts))
                        yield healed.tensors

                found = write_healed(student, tensors(), output, verify=verify_checkpoint)
        with open_decoder(open_checkpoint(output, verify=False), *options) as (pupil, _):
            after = measure_divergence(teacher, pupil, windows.heldout)
    facts = {"tokens": windows.tokens, "rate": settings.rate or RATE, "layers": layers, "start": before, "best": after}
    ended = {"ended": "all layers done", "kept": "best", "seconds": round(time.perf_counter() - started, 1)}
    return found, facts | ended


def _describe_windows(windows: HealingWindows) -> dict[str, Any]:
    return {
        "windows": dict(windows.windows),
        "context": windows.train.shape[1],
        "heldout_source": windows.source,
        "heldout_tokens": windows.heldout.numel(),
    }
