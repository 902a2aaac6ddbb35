"""What a job will cost, from facts and arithmetic alone: the pieces its stages reckon with."""

from collections.abc import Sequence
from typing import Any

from mka.alignment.table import walk_nbytes
from mka.model.checkpoint import Checkpoint
from mka.pipeline.job import Job
from mka.pipeline.target import foresee_rounded
from mka.recipe import QuantizeSettings
from mka.texts.writing import BATCH, LONGEST
from mka.transforms import outline_treated

# Tokenizer, configuration, card and report: what a folder holds beside its weights.
COMPANIONS_NBYTES = 64_000_000
# float32 copies of one window's logits that are there at a time, beside the batch's own.
LOGIT_COPIES = 2
# Numbers in memory per weight that is trained: itself, its gradient, and the two moments of AdamW.
TRAINED = 4
# Copies of the logits of one training step: of both models, their log-probabilities, and the gradient.
TRAINING_LOGITS = 5
# Most windows of perplexity in one forward pass.
WINDOWS = 4


def width_of(job: Job) -> int:
    """Bytes of one number in the precision of forward passes."""
    return 4 if job.recipe.model.dtype == "float32" else 2


def whole_model(job: Job) -> int:
    """Bytes of all weights in memory."""
    return width_of(job) * sum(t.parameters for t in job.base.tensors.values())


def head_nbytes(job: Job) -> int:
    """Bytes of the language-model head in memory."""
    return width_of(job) * job.base.config["vocab_size"] * job.base.config["hidden_size"]


def largest_layer(job: Job) -> int:
    """Bytes of the largest layer in memory."""
    layers = (job.base.layer_tensors(i).values() for i in range(job.base.layers))
    return width_of(job) * max(sum(t.parameters for t in layer) for layer in layers)


def count_tokens(job: Job) -> list[int]:
    """Tokens of each calibration text; empty if there are none."""
    from mka.model.loading import load_tokenizer
    from mka.texts.tokens import tokenize

    if job.inputs.calibration is None:
        return []
    tokenizer = load_tokenizer(job.base.path, job.recipe.model.trust_remote_code)
    texts = job.inputs.calibration.texts
    return [len(ids) for ids in tokenize(tokenizer, texts, job.recipe.calibration.max_tokens)]


def estimate_states(job: Job, lengths: Sequence[int] | None = None) -> int:
    """Bytes of the hidden states of all calibration tokens before and after a layer, and of the pooled ones."""
    lengths = count_tokens(job) if lengths is None else lengths
    hidden = job.base.config["hidden_size"]
    return (job.base.layers + 1) * len(lengths) * hidden * 4 + 2 * sum(lengths) * hidden * width_of(job)


def estimate_observing(job: Job, lengths: Sequence[int] | None = None) -> int:
    """Bytes of what observing holds: one layer, and `estimate_states`."""
    return largest_layer(job) + estimate_states(job, lengths)


def estimate_writing(job: Job) -> int:
    """Bytes of what the base needs to write its own text: all weights, and the cache of one batch; 0 if it is there."""
    if job.inputs.own_text is None or not job.inputs.own_text.foreseen:
        return 0
    # Keys and values are at most as wide as the hidden states.
    cached = 2 * job.base.layers * job.base.config["hidden_size"] * width_of(job)
    return whole_model(job) + BATCH * LONGEST * cached


def estimate_search(job: Job, settings: Any) -> int:
    """Bytes of what a search over whole configurations keeps, and of the dearest thing it does with it.

    What enters every layer, for all measured tokens, with two windows' logits; and of an alignment what
    `mka.alignment.table.estimate_memory` reckons with, or a finalist's healing, whichever is more.

    Args:
        job: what is done.
        settings: of a method that needs `mka.evidence.needs.REPAIRS`.
    """
    measured, config = settings.tokens[-1], job.base.config
    entering = (job.base.layers + 1) * measured * config["hidden_size"] * width_of(job)
    logits = LOGIT_COPIES * 4 * settings.context * config["vocab_size"]
    repairs = [logits]
    if settings.repair == "aligned":
        walked, inner = measured + settings.aligned_tokens, config["intermediate_size"]
        repairs.append(logits + walk_nbytes(walked, config["hidden_size"], inner, width_of(job)))
    if settings.finalists:
        repairs.append(estimate_distillation(job, settings.context))
    return entering + max(repairs)


def estimate_distillation(job: Job, rows: int) -> int:
    """Bytes of base and student as a whole while the student is trained, with the logits of so many positions."""
    logits = TRAINING_LOGITS * rows * job.base.config["vocab_size"] * 4
    return whole_model(job) + TRAINED * student_nbytes(job) + logits


def student_nbytes(job: Job) -> int:
    """Bytes of the merged model's weights in float32."""
    return round(4 * sum(t.parameters for t in job.base.tensors.values()) * merged_nbytes(job) / job.base.nbytes)


def estimate_logits(job: Job) -> int:
    """Bytes of the logits of one batch of windows."""
    settings = job.recipe.evaluation
    width = min(settings.batch_size, WINDOWS) * width_of(job) + LOGIT_COPIES * 4
    return settings.context * job.base.config["vocab_size"] * width


def merged_nbytes(job: Job) -> int:
    """Bytes of the merged model's tensors."""
    return _cut_nbytes(job.base, job)


def list_treated_nbytes(job: Job) -> list[int]:
    """Bytes of the merged model's tensors after each of the recipe's transforms."""
    return [_cut_nbytes(outline, job) for outline in outline_treated(job.base, job.treatments)[1:]]


def treated_nbytes(job: Job) -> int:
    """Bytes of the merged model's tensors after all of the recipe's transforms."""
    return _cut_nbytes(outline_treated(job.base, job.treatments)[-1], job)


def candidate_nbytes(job: Job) -> int:
    """Bytes of the candidate's tensors: transformed, and rounded, if they will be."""
    outline = outline_treated(job.base, job.treatments)[-1]
    return foresee_rounded(outline, job.recipe.quantize, job.aim.layers_out)


def list_control_nbytes(job: Job) -> list[int]:
    """Bytes of all that is written for the control, all layers kept; last, those of its own tensors."""
    settings, outlines = job.recipe.quantize, outline_treated(job.base, job.treatments)
    sizes = [outline.nbytes for outline in outlines[1:]]
    if settings.scheme == "off":
        return sizes
    # Verification unpacks what was rounded once more.
    return [*sizes, outlines[-1].nbytes, foresee_rounded(outlines[-1], settings, job.base.layers)]


def _cut_nbytes(checkpoint: Checkpoint, job: Job) -> int:
    return foresee_rounded(checkpoint, QuantizeSettings(), job.aim.layers_out)
