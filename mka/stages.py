"""The stages between a base checkpoint and its candidate, each one call. The command line and the flow share them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mka.calibration import CalibrationSet
from mka.checkpoint import Checkpoint
from mka.cuts import CutEvidence, find_cuts
from mka.errors import CheckpointError, PlanError
from mka.folds import Folds, require_finite
from mka.merging import check_alignable, check_plan_fits, merge_checkpoint, plan_tensors
from mka.methods import HIDDEN_STATES, TRIALS, Aim, Evidence, find_needs, resolve_method
from mka.oracles import observe_texts, open_oracles
from mka.plan import MergePlan
from mka.planning import resolve_target
from mka.progress import show_progress
from mka.quantize import check_group_size, quantize_checkpoint
from mka.recipe import (
    AlignmentSettings,
    CalibrationSettings,
    MethodChoice,
    ModelSource,
    QuantizeSettings,
    Recipe,
    Target,
)
from mka.states import HiddenStates, LayerScores
from mka.verification import inspect_checkpoint, require_sound


def observe_checkpoint(
    checkpoint: Checkpoint, calibration: CalibrationSet, settings: CalibrationSettings, source: ModelSource
) -> HiddenStates:
    """Observe a checkpoint's layers on its calibration set.

    Raises:
        CheckpointError: if the model does not load whole.
        NumericsError: if hidden states are not finite.
    """
    from mka.loading import open_decoder

    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        return observe_texts(decoder, tokenizer, calibration.texts, settings, "observe layers")


def needs_hidden_states(choice: MethodChoice) -> bool:
    """Whether a method looks at hidden states at all."""
    return HIDDEN_STATES in find_needs(choice)


def tries_alignments(choice: MethodChoice) -> bool:
    """Whether a method measures aligned merges while planning."""
    return TRIALS in find_needs(choice)


def alignment_version() -> int:
    """Version of aligned merging, part of what its results are stored by."""
    from mka.alignment import VERSION  # imports torch

    return VERSION


def score_layers(choice: MethodChoice, checkpoint: Checkpoint, states: HiddenStates | None) -> LayerScores | None:
    """Score a checkpoint's layers; None for a method that does not look at them.

    Raises:
        NumericsError: if scores come out NaN, infinite or out of range.
        PlanError: if the hidden states are of another model.
    """
    method, settings = resolve_method(choice)
    if method.score is None:
        return None
    if states is None or states.layers != checkpoint.layers:
        given = "none" if states is None else f"{states.layers} layers"
        raise PlanError(f"method {choice.name!r} needs hidden states of {checkpoint.layers} layers, got {given}")
    pairs = checkpoint.layers * (checkpoint.layers + 1) // 2
    with show_progress("score layer pairs", pairs, "pair") as advance:
        evidence = Evidence(checkpoint.layers, checkpoint.kinds, states, on_progress=advance)
        return method.score(evidence, settings)


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
    from mka.benchmarks import check_tasks

    aim = resolve_aim(recipe.target, checkpoint)
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.path}: weights are already quantized; name the original model instead")
    if recipe.quantize.scheme != "off":
        check_group_size(checkpoint, recipe.quantize.group_size)
    check_tasks(recipe.evaluation.tasks)
    return aim


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
    from mka.loading import load_model
    from mka.observe import tokenize
    from mka.residuals import stream_cuts

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
    from mka.aligning import Aligner
    from mka.loading import open_decoder

    check_alignable(plan, aligned=True)
    check_plan_fits(plan, checkpoint)
    with open_decoder(checkpoint, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        aligner = Aligner(decoder, tokenizer, texts, settings)
        found = merge_checkpoint(plan, checkpoint, output, aligned=aligner.align(plan.layers), verify=_verify)
    return found | {"alignment": aligner.facts}


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


def write_quantized(checkpoint: Checkpoint, settings: QuantizeSettings, output: Path) -> dict[str, Any]:
    """Quantize, verify with a stranger's loader, publish; returns what the loader found.

    Raises:
        RecipeError: if the group size does not fit.
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
    """
    linear = sum(len(t.shape) == 2 for i in range(checkpoint.layers) for t in checkpoint.layer_tensors(i).values())
    with show_progress("round weights", linear, "matrix") as advance:
        return quantize_checkpoint(checkpoint, output, settings, verify=_verify, on_module=advance)


def _verify(folder: Path) -> dict[str, Any]:
    facts = inspect_checkpoint(folder)
    require_sound(facts, folder)
    return facts
