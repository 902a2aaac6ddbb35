"""The stage that writes the planned model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mka.model.checkpoint import Checkpoint
from mka.model.verification import _verify
from mka.plan.plan import MergePlan
from mka.recipe import (
    AlignmentSettings,
    ModelSource,
)
from mka.terminal import show_progress
from mka.transforms.fold import Folds
from mka.transforms.merge import check_alignable, check_plan_fits, merge_checkpoint, plan_tensors


def write_aligned(
    plan: MergePlan,
    checkpoint: Checkpoint,
    texts: Mapping[str, Sequence[str]],
    settings: AlignmentSettings,
    source: ModelSource,
    output: Path,
) -> dict[str, Any]:
    """Merge while refitting every layer from the first change on, verify with a stranger's loader, publish.

    Args:
        plan: what to make.
        checkpoint: the base.
        texts: source -> texts to fit on.
        settings: tokens, windows and penalty.
        source: precision of the forward passes.
        output: folder to publish.

    Returns:
        What the loader found, and under ``"alignment"`` the facts of the fit.

    Raises:
        CalibrationError: if there is too little text.
        PlanError: if the plan was made with folds, or selects units where the family has none to share.
        NumericsError: if a fit is not finite.
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    from mka.alignment.aligner import Aligner
    from mka.model.loading import open_decoder

    check_alignable(plan, aligned=True)
    check_plan_fits(plan, checkpoint)
    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        found, facts = Aligner(decoder, tokenizer, texts, settings).align(
            plan.layers, lambda tensors: merge_checkpoint(plan, checkpoint, output, aligned=tensors, verify=_verify)
        )
    return found | {"alignment": facts}


def write_merged(plan: MergePlan, checkpoint: Checkpoint, output: Path, folds: Folds | None = None) -> dict[str, Any]:
    """Merge, fold in what `fit_folds` returned, verify with a stranger's loader, publish.

    Returns:
        What the loader found.

    Raises:
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    total = sum(info.nbytes for info, _, _ in plan_tensors(plan.layers, checkpoint))
    with show_progress("merge layers", total, "B", scale=True) as advance:
        return merge_checkpoint(plan, checkpoint, output, folds=folds, on_tensor=advance, verify=_verify)
