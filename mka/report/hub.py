"""What a hub reads of a card: how a model relates to its base, under which licence it is, what was measured of it."""

import math
from typing import Any

from mka.evaluation.metrics import METRICS
from mka.evaluation.scores import EvalReport
from mka.report.data import ReportData

# What a model is to its base, in the words that hubs know.
FINETUNE, MERGE, QUANTIZED = "finetune", "merge", "quantized"
LICENSE_KEYS = ("license", "license_name", "license_link")
_MEASURED_ON = {"texts": "held-out text", "tasks": "lm-eval task", "own items": "items made from a seed"}


def describe_for_hub(data: ReportData, name: str) -> str:
    """Return a card's front matter, YAML without its fences.

    Args:
        data: of the report.
        name: of the model, for its results.
    """
    from huggingface_hub import ModelCardData

    results = list_results(data.candidate) if data.candidate else []
    tags = ["mka", data.plan.method, "layer-merging", "compression"]
    found = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        # Hubs refuse a card whose base_model is not a model id; other sources are named in the text.
        base_model=(data.recipe.get("model") or {}).get("hub"),
        base_model_relation=name_relation(data),
        **{key: data.provenance.get(key) for key in LICENSE_KEYS},
        tags=list(dict.fromkeys(tags)),
        **({"eval_results": results, "model_name": name} if results else {}),
    )
    return str(found.to_yaml())


def name_relation(data: ReportData) -> str | None:
    """Name what the candidate is to its base; None if it is the same model.

    A hub takes one word. Fewer layers come before fewer bits: what is listed as quantized is taken for the base itself
    in another precision.
    """
    if data.healing:
        return FINETUNE
    if not data.plan.is_identity:
        return MERGE
    rounded = (data.recipe.get("quantize") or {}).get("scheme", "off") != "off"
    return QUANTIZED if rounded else None


def list_results(report: EvalReport) -> list[Any]:
    """List what was measured as a hub's `EvalResult`, each with its standard error and number of items."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.name,
            dataset_name=f"{score.name} ({_MEASURED_ON[METRICS[score.metric].on]})",
            metric_type=score.metric,
            metric_name=f"{score.metric}, {METRICS[score.metric].unit}",
            metric_value=score.value,
            metric_args={"stderr": score.stderr, "n": score.n},
        )
        for score in report.scores
        if score.metric in METRICS and math.isfinite(score.value)
    ]
