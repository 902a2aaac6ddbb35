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
from mka.transforms import get_transform
from mka.transforms.fold import Folds
from mka.transforms.merge import ALIGNED, FOLDS, check_alignable


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
    transform = get_transform("merge")
    transform.check(checkpoint, plan)
    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        aligner = Aligner(decoder, tokenizer, texts, settings)
        found = transform.apply(checkpoint, plan, {ALIGNED: aligner.align(plan.layers)}, output, verify=_verify)
    return found | {"alignment": aligner.facts}


def write_merged(plan: MergePlan, checkpoint: Checkpoint, output: Path, folds: Folds | None = None) -> dict[str, Any]:
    """Merge, fold in what `fit_folds` returned, verify with a stranger's loader, publish.

    Returns:
        What the loader found.

    Raises:
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    transform = get_transform("merge")
    with show_progress(transform.summary, transform.foresee(checkpoint, plan), "B", scale=True) as advance:
        return transform.apply(checkpoint, plan, {FOLDS: folds}, output, verify=_verify, on_tensor=advance)
