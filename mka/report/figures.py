"""What a run came to, for machines: the figures of the page as numbers."""

import math
from collections.abc import Mapping
from typing import Any

from mka.evaluation.bootstrap import find_bounds, resample_means
from mka.evaluation.metrics import find_metric
from mka.evaluation.scores import EvalReport, Score
from mka.report.control import has_own_control, tell_against_control

SIZES = ("layers", "parameters", "bytes", "dtype")


def collect_figures(
    base: EvalReport, candidate: EvalReport, control: EvalReport | None, *, seed: int, resamples: int = 2000
) -> dict[str, Any]:
    """Return sizes, scores with their intervals, and speeds of all three, JSON-able (docs/formats.md).

    Args:
        base: its measurements.
        candidate: the same of the candidate.
        control: the base rounded alike with all layers kept; where it is the base itself, there is none of its own.
        seed: of the resampling; the gate's, so that bounds of the same score are drawn alike.
        resamples: bootstrap resamples.
    """

    def collect(report: EvalReport) -> dict[str, Any]:
        scores = [_collect_score(score, seed, resamples) for score in report.scores]
        sizes = {name: report.checkpoint.get(name) for name in SIZES}
        return sizes | {"scores": scores, "speed": dict(report.speed)}

    own = control if control is not None and has_own_control(base, control) else None
    return {
        "base": collect(base),
        "candidate": collect(candidate),
        "control": collect(own) if own else None,
        "against_control": tell_against_control(base, candidate, control) or None,
    }


def _collect_score(score: Score, seed: int, resamples: int) -> Mapping[str, Any]:
    metric = find_metric(score.metric)
    _, draws = resample_means([(score,)], seed=seed, resamples=resamples)
    lower, upper = find_bounds(metric.value(draws[:, 0]), score.n)
    found = {"value": score.value, "stderr": score.stderr, "lower": lower, "upper": upper}
    told = {name: number if math.isfinite(number) else None for name, number in found.items()}
    return {"name": score.name, "metric": score.metric, **told, "n": score.n}
