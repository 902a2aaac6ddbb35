"""What a job will cost, from facts and arithmetic alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mka.alignment.table import estimate_memory
from mka.evidence.needs import HIDDEN_STATES, REOBSERVE
from mka.methods import find_needs, get_method, resolve_method
from mka.model.checkpoint import describe_checkpoint
from mka.pipeline.job import EVIDENCE, Job
from mka.transforms import get_quantizer

# Tokenizer, configuration, card and report: what a folder holds beside its weights.
COMPANIONS_NBYTES = 64_000_000


def foresee(job: Job, output: Path) -> dict[str, Any]:
    """Say what a compression would do, from facts and arithmetic alone.

    Returns:
        base and candidate (layers, parameters, bytes), tokens to observe and to align on, estimates of peak memory
        and disk in bytes, and the files that would be written.
    """
    from transformers import AutoTokenizer

    from mka.texts.tokens import tokenize

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
        # Verification unpacks a quantized model once more.
        "disk_bytes": merged
        + (candidate_nbytes(job) + merged if recipe.quantize.scheme != "off" else 0)
        + COMPANIONS_NBYTES,
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
    saved = job.base.nbytes - get_quantizer(settings.scheme).foresee(job.base, settings)
    return round(_merged_nbytes(job) - saved * job.aim.layers_out / job.base.layers)


def _memory_nbytes(job: Job, lengths: Sequence[int]) -> int:
    """Estimate the peak: the model once or twice, or one layer where it is only walked; states; a batch of logits."""
    recipe, config = job.recipe, job.base.config
    width = 4 if recipe.model.dtype == "float32" else 2
    needs, quantized = find_needs(recipe.method), recipe.quantize.scheme != "off"
    aligned = _foresee_alignment(job)
    if job.measured or needs - {HIDDEN_STATES} or get_method(recipe.method.name).fit:
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
