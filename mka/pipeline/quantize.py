"""Quantize: the linear layers rounded, and embedding and head where asked for."""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mka.alignment.gptq import CONTEXT, MEASURED
from mka.alignment.table import walk_nbytes
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.verification import verify_checkpoint
from mka.outside.sizes import format_size
from mka.pipeline.foresee import LOGIT_COPIES, candidate_nbytes, largest_layer, treated_nbytes, width_of
from mka.pipeline.job import Job
from mka.pipeline.merge import describe_model
from mka.pipeline.stage import MODEL_FOLDER, Cost, Found, Stage, find_model
from mka.pipeline.transform import apply_transform, check_transform, digest_evidence, key_evidence, offer_evidence
from mka.recipe import QuantizeSettings
from mka.transforms import MIXED, SCHEMES, get_quantizer, list_options, looks_at_texts


def check_quantizer(checkpoint: Checkpoint, settings: QuantizeSettings, given: Collection[str] = ()) -> None:
    """Refuse what a scheme cannot do, before work begins.

    Args:
        checkpoint: what will be quantized, or the base it will be made of.
        settings: of a scheme other than "off".
        given: the kinds of evidence there will be.

    Raises:
        RecipeError: if group size, widths or embedding do not fit, or evidence is missing.
        PlanError: if the layers have parts that the scheme's transform cannot treat.
        CheckpointError: if the weights are quantized already.
    """
    transform = get_quantizer(settings)
    check_transform(transform, settings, checkpoint, given, asked=_ask(settings))


def write_quantized(
    checkpoint: Checkpoint,
    settings: QuantizeSettings,
    output: Path,
    evidence: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Quantize, verify with a stranger's loader, publish; returns what the loader found.

    Args:
        checkpoint: unquantized.
        settings: of a scheme other than "off".
        output: folder to publish.
        evidence: kind -> what the scheme's transform asks for.

    Raises:
        CheckpointError: if the written folder does not load whole or does not generate soundly.
        OutputError: if it cannot be written.
        MkaError: as `check_quantizer`.
    """
    transform, asked = get_quantizer(settings), _ask(settings)
    return apply_transform(transform, settings, checkpoint, evidence, output, asked=asked, verify=verify_checkpoint)


def _ask(settings: QuantizeSettings) -> str:
    return f"quantize.scheme {settings.scheme}" if settings.rounding == "nearest" else f"rounding {settings.rounding}"


def describe_rounding(settings: QuantizeSettings) -> str:
    """Say what rounded weights are stored as, e.g. "int8 in groups of 64"."""
    if settings.scheme == MIXED:
        asked = settings.bytes
        budget = f"{settings.bits_per_weight:g} bits per weight" if asked is None else f"{format_size(asked)} in all"
        scales, inputs = f"{budget} in groups of {settings.group_size}", ""
    else:
        row = SCHEMES[settings.scheme]
        scales = f"in groups of {settings.group_size}" if row.grouped else "by rows"
        inputs = "" if row.activations is None else " and tokens"
    embeddings = "" if settings.embeddings == "off" else f", embeddings {settings.embeddings} by rows"
    by = "" if settings.rounding == "nearest" else f", {settings.rounding} on at most {settings.tokens:,} tokens"
    return f"{settings.scheme} {scales}{inputs}{by}{embeddings}"


def key_rounding(settings: QuantizeSettings) -> dict[str, Any]:
    """Return the settings that decide what is written; where it will run decides only what is refused."""
    grouped = settings.scheme in ("off", MIXED) or SCHEMES[settings.scheme].grouped
    # What is off is not spelled, so that results of before there were embeddings to round are found again.
    nearest = settings.rounding == "nearest"
    unused = {"serve_on": True, "embeddings": settings.embeddings == "off", "group_size": not grouped}
    unused |= {"rounding": nearest, "tokens": nearest, "bits_per_weight": settings.bits_per_weight is None}
    unused |= {"bytes": settings.bytes is None}
    keyed = settings.model_dump(exclude={name for name, left_out in unused.items() if left_out})
    # Where bits are mixed, where it will run decides which there are.
    return keyed | ({"options": list_options(settings)} if settings.scheme == MIXED else {})


def estimate_rounding(job: Job) -> int:
    """Bytes of what rounding holds: a layer; where it looks at texts, a layer more and what a walk of them needs."""
    settings, config, calibration = job.recipe.quantize, job.base.config, job.inputs.calibration
    if calibration is None or not looks_at_texts(settings):
        return largest_layer(job)
    # A token is a byte or more.
    tokens = min(settings.tokens, sum(len(text.encode()) for text in calibration.texts))
    width = config["hidden_size"]
    walked = walk_nbytes(tokens, width, config["intermediate_size"], width_of(job))
    if settings.scheme == MIXED:
        measured = min(tokens, MEASURED * CONTEXT)
        # What enters every layer, and the base's log-probabilities beside those of one window in the making.
        kept = (job.base.layers + 8) * width * width_of(job) + (1 + LOGIT_COPIES / MEASURED) * config["vocab_size"] * 4
        walked = max(walked, round(measured * kept))
    return 2 * largest_layer(job) + walked


def _make(job: Job, found: Found, folder: Path) -> Mapping[str, Any]:
    settings, output = job.recipe.quantize, folder / MODEL_FOLDER
    source = open_checkpoint(find_model(found).open() / MODEL_FOLDER, verify=False)
    loaded = write_quantized(source, settings, output, offer_evidence(job))
    said = describe_rounding(settings)
    return describe_model(output, loaded, said) | {"rounding": {"how": said, **loaded.get("rounding", {})}}


def _needs(job: Job) -> frozenset[str]:
    return get_quantizer(job.recipe.quantize).needs


def _foresee(job: Job) -> Cost:
    # Verification unpacks the model once more, and what is rounded by texts waits on the disk until it is written.
    written = candidate_nbytes(job) * (2 if looks_at_texts(job.recipe.quantize) else 1)
    return Cost(memory=estimate_rounding(job), disk=written + treated_nbytes(job))


QUANTIZE = Stage(
    "quantize",
    version=3,
    wanted=lambda job: job.recipe.quantize.scheme != "off",
    reads=lambda job, found: {"merged": find_model(found).facts["digest"]} | digest_evidence(job, _needs(job)),
    settings=lambda job: key_rounding(job.recipe.quantize) | key_evidence(job, _needs(job)),
    make=_make,
    foresee=_foresee,
    describe=lambda job: f"quantize to {job.recipe.quantize.scheme}",
)
