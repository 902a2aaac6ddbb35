"""The stages between a base checkpoint and its candidate, each one call. The command line and the flow share them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

from mka.errors import PlanError
from mka.evidence.cuts import CutEvidence, find_cuts
from mka.evidence.gather import open_oracles
from mka.evidence.needs import RUNNING, TRIALS, Evidence
from mka.evidence.states import LayerScores
from mka.methods import find_needs, resolve_method
from mka.model.checkpoint import Checkpoint
from mka.pipeline.job import resolve_aim
from mka.plan.plan import MergePlan
from mka.recipe import (
    CalibrationSettings,
    MethodChoice,
    ModelSource,
    Target,
)
from mka.terminal import show_progress
from mka.texts.calibration import CalibrationSet
from mka.transforms.fold import Folds, require_finite


def tries_alignments(choice: MethodChoice) -> bool:
    """Whether a method measures aligned merges while planning."""
    return TRIALS in find_needs(choice)


def alignment_version() -> int:
    """Version of aligned merging, part of what its results are stored by."""
    from mka.alignment.lockstep import VERSION

    return VERSION


def open_method_oracles(
    choice: MethodChoice,
    checkpoint: Checkpoint,
    calibration: CalibrationSet | None,
    settings: CalibrationSettings,
    source: ModelSource,
) -> AbstractContextManager[Mapping[str, Any]]:
    """Return what a recipe's method looks at while planning, as `open_oracles` does, to be entered.

    Raises:
        PlanError: if it looks at calibration texts and there is no calibration set.
    """
    method, options = resolve_method(choice)
    needs = method.needs(options)
    if calibration is None and needs & RUNNING:
        raise PlanError(f"method {choice.name!r} with these settings needs a calibration set; give one")
    return open_oracles(needs, options, checkpoint, calibration.texts if calibration else (), settings, source)


def plan_layers(
    choice: MethodChoice,
    target: Target,
    checkpoint: Checkpoint,
    scores: LayerScores | None,
    calibration: CalibrationSet | None,
    settings: CalibrationSettings,
    source: ModelSource,
    oracles: Mapping[str, Any] | None = None,
) -> MergePlan:
    """Plan; opens the model only for a method that, under its settings, looks at it while planning.

    Plans for several targets may share the ``oracles`` that `open_method_oracles` gave; the default opens new ones.

    Raises:
        RecipeError: if the target cannot be met.
        PlanError: if protection and layer kinds leave nothing to merge.
    """
    method, method_options = resolve_method(choice)
    aim = resolve_aim(target, checkpoint)
    with ExitStack() as stack:
        if oracles is None:
            oracles = stack.enter_context(open_method_oracles(choice, checkpoint, calibration, settings, source))
        evidence = Evidence(checkpoint.layers, checkpoint.kinds, **oracles)
        with show_progress("plan merges", *method.units(checkpoint.layers, aim, method_options)) as advance:
            plan = method.plan(replace(evidence, on_progress=advance), scores, aim, method_options)
    base = {"model": source.label, "digest": checkpoint.digest, "model_type": checkpoint.family.model_type}
    return replace(plan, base=base)


def fit_folds(
    choice: MethodChoice,
    plan: MergePlan,
    checkpoint: Checkpoint,
    calibration: CalibrationSet | None,
    settings: CalibrationSettings,
    source: ModelSource,
) -> Folds | None:
    """Fit what a method folds into the model after a deletion; None if it fits nothing, or nothing was deleted.

    Raises:
        PlanError: if there is no calibration set to fit on.
        NumericsError: if the fit is singular or not finite.
    """
    method, method_options = resolve_method(choice)
    cuts = find_cuts(plan) if method.fit else ()
    if method.fit is None or not cuts:
        return None
    if calibration is None:
        raise PlanError(f"method {choice.name!r} is fitted on calibration texts; give a calibration set")
    from mka.evidence.residuals import stream_cuts
    from mka.model.loading import open_decoder
    from mka.texts.tokens import tokenize

    texts, limit, family = calibration.texts, settings.max_tokens, checkpoint.family
    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        passes = (cuts[-1].deleted[-1] + 1) * sum(map(len, tokenize(tokenizer, texts, limit)))
        with show_progress("fit folds", passes, "tok") as advance:
            options: dict[str, Any] = {"max_tokens": limit, "batch_size": settings.batch_size, "on_layer": advance}
            evidence = CutEvidence(
                family, decoder.is_tied, cuts, lambda: stream_cuts(decoder, tokenizer, texts, cuts, **options)
            )
            folds = dict(method.fit(evidence, plan, method_options))
    require_finite(folds)
    # Some checkpoints store the tied head beside the embedding.
    if decoder.is_tied and family.head_tensor in checkpoint.tensors and family.embedding_tensor in folds:
        folds[family.head_tensor] = folds[family.embedding_tensor]
    return folds
