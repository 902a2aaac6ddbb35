"""The stages between a base checkpoint and its candidate, each one call. The command line and the flow share them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mka.errors import PlanError
from mka.evidence.cuts import CutEvidence, find_cuts
from mka.evidence.gather import open_oracles
from mka.evidence.needs import TRIALS, Evidence
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
    """Plan; loads the model only for a method that, under its settings, looks at it while planning.

    Plans for several targets may share the ``oracles`` that `open_oracles` returned; the default opens new ones.

    Raises:
        RecipeError: if the target cannot be met.
        PlanError: if protection and layer kinds leave nothing to merge.
    """
    method, method_options = resolve_method(choice)
    aim = resolve_aim(target, checkpoint)
    if oracles is None:
        oracles = open_oracles(choice, checkpoint, calibration, settings, source)
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
    from mka.model.loading import load_model
    from mka.texts.tokens import tokenize

    model, tokenizer = load_model(checkpoint.path, source.dtype, source.trust_remote_code)
    texts, limit = calibration.texts, settings.max_tokens
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with show_progress("fit folds", sum(map(len, tokenize(tokenizer, texts, limit))), "tok") as advance:
        options: dict[str, Any] = {"max_tokens": limit, "batch_size": settings.batch_size, "on_batch": advance}
        evidence = CutEvidence(
            checkpoint.family, tied, cuts, lambda: stream_cuts(model, tokenizer, texts, cuts, **options)
        )
        folds = dict(method.fit(evidence, plan, method_options))
    require_finite(folds)
    # Some checkpoints store the tied head beside the embedding.
    if tied and "lm_head.weight" in checkpoint.tensors and "model.embed_tokens.weight" in folds:
        folds["lm_head.weight"] = folds["model.embed_tokens.weight"]
    return folds
