"""The gate: is enough of the base left? Decided on bounds of recovery, not on point estimates."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mka.errors import GuardError, NumericsError
from mka.evaluation.bootstrap import CONFIDENCE, _mismatch, _task_recovery, find_bounds, resample_rates
from mka.evaluation.evaluate import pair_scores
from mka.evaluation.scores import EvalReport
from mka.recipe import GateSettings

Verdict = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class GateCheck:
    """One recovery against its threshold.

    Attributes:
        name: "perplexity SOURCE" or "tasks".
        recovery: point estimate, 1 = as good as the base.
        lower: one-sided 95 % lower confidence bound.
        upper: one-sided 95 % upper confidence bound; infinite if resamples leave the base without a solved item.
        threshold: smallest acceptable recovery.
        verdict: "pass" if lower >= threshold, "fail" if upper < threshold, else "undecided".
        n: windows or items behind it.
    """

    name: str
    recovery: float
    lower: float
    upper: float
    threshold: float
    verdict: Verdict
    n: int


@dataclass(frozen=True)
class GateDecision:
    """The verdict and the numbers it rests on.

    Attributes:
        verdict: "fail" if any check fails, else "undecided" if any is undecided, else "pass".
        checks: one per held-out source, and one over all tasks.
        confidence: of each one-sided bound.
        resamples: bootstrap resamples.
        seed: of the resampling.
    """

    verdict: Verdict
    checks: tuple[GateCheck, ...]
    confidence: float
    resamples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; an upper bound that the data do not give is None."""
        body = asdict(self)
        body["checks"] = [{**c, "upper": c["upper"] if np.isfinite(c["upper"]) else None} for c in body["checks"]]
        return body

    def describe(self) -> list[str]:
        """Return aligned lines for a terminal: the verdict, then one line per check."""
        return describe_decision(self.to_dict())


def describe_decision(body: Mapping[str, Any]) -> list[str]:
    """Return aligned lines for a terminal of what `GateDecision.to_dict` gave: the verdict, then a line per check."""
    checks = body["checks"]
    width = max(len(check["name"]) for check in checks)
    lines = [
        f"gate: {body['verdict']} (one-sided {body['confidence']:.0%} bounds, {body['resamples']} paired resamples)"
    ]
    for c in checks:
        upper = np.inf if c["upper"] is None else c["upper"]
        lines.append(
            f"  {c['name']:<{width}}  recovery {c['recovery']:6.3f}  bounds [{c['lower']:6.3f}, {upper:6.3f}]"
            f"  needed {c['threshold']:5.3f}  n {c['n']:>6}  {c['verdict']}"
        )
    return lines


def decide(
    base: EvalReport, candidate: EvalReport, settings: GateSettings, *, seed: int, resamples: int = 2000
) -> GateDecision:
    """Decide whether a candidate keeps enough of its base.

    Recovery of perplexity, per held-out source: ``base perplexity / candidate perplexity``, resampling windows.
    Recovery of tasks: ``mean over tasks of the candidate's score / mean over tasks of the base's score``, each task
    weighing the same, resampling items within each task. Base and candidate share every resample (paired), so what
    both find hard cancels.

    Bounds are one-sided 95 % bounds of the expanded percentile bootstrap: the quantile levels are
    ``Phi(-+ sqrt(n/(n-1)) t_{0.95, n-1})`` instead of 5 % and 95 %, which makes up for the narrowness of the
    bootstrap at small n (T. Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69,
    2015). For tasks n is the smallest number of items of any task. At large n the levels are 5 % and 95 %.

    Args:
        base: report of the base.
        candidate: report of the candidate, on the same windows and items.
        settings: thresholds.
        seed: of the resampling.
        resamples: bootstrap resamples.

    Raises:
        GuardError: if the reports are empty or were not measured on the same windows and items.
        NumericsError: if a recovery is undefined: a base that solves no item, or a value that is not finite.
    """
    pairs = pair_scores(base, candidate)
    for before, after in pairs:
        if reason := _mismatch(before, after):
            raise GuardError(f"{before.name!r}: base and candidate differ in {reason}; evaluate both alike")
    checks = []
    for before, after in (pair for pair in pairs if pair[0].metric == "perplexity"):
        rates, resampled = resample_rates((before, after), seed=seed, resamples=resamples)
        recovery, draws = float(np.exp(rates[0] - rates[1])), np.exp(resampled[:, 0] - resampled[:, 1])
        name = f"perplexity {before.name}"
        checks.append(_check(name, recovery, draws, settings.perplexity_recovery, before.n, before.n))
    if tasks := [pair for pair in pairs if pair[0].metric != "perplexity"]:
        recovery, draws = _task_recovery(tasks, resamples, seed)
        sizes = [before.n for before, _ in tasks]
        checks.append(_check("tasks", recovery, draws, settings.task_recovery, sum(sizes), min(sizes)))
    if not checks:
        raise GuardError("the gate has nothing to decide on; evaluate on held-out text or on tasks")
    return GateDecision(combine_verdicts([c.verdict for c in checks]), tuple(checks), CONFIDENCE, resamples, seed)


def recover_tasks(
    base: EvalReport, candidate: EvalReport, *, seed: int, resamples: int = 2000
) -> tuple[dict[str, Any], ...]:
    """Recovery of each task alone with the bounds of `decide`, to be looked at; nothing is judged by it.

    Returns:
        name, recovery, lower, upper (None where the data give no bound) and n per task. A task of which the base
        solves no item has no recovery and is left out.
    """
    rows = []
    for before, after in pair_scores(base, candidate):
        if before.metric == "perplexity" or before.n < 2 or not any(before.items):
            continue
        recovery, draws = _task_recovery([(before, after)], resamples, seed)
        lower, upper = find_bounds(draws, before.n)
        found = {"recovery": recovery, "lower": lower, "upper": upper if np.isfinite(upper) else None}
        rows.append({"name": before.name, **found, "n": before.n})
    return tuple(rows)


def judge(lower: float, upper: float, threshold: float) -> Verdict:
    """Judge one check by its bounds."""
    if lower >= threshold:
        return "pass"
    return "fail" if upper < threshold else "undecided"


def combine_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """One failure fails all; one doubt leaves all undecided."""
    for worst in ("fail", "undecided"):
        if worst in verdicts:
            return worst
    return "pass"


def _check(
    name: str, recovery: float, draws: NDArray[np.float64], threshold: float, n: int, smallest: int
) -> GateCheck:
    if not np.isfinite(recovery):
        raise NumericsError(f"{name}: recovery is {recovery}; the base's or the candidate's score is not usable")
    lower, upper = find_bounds(draws, smallest)
    return GateCheck(name, recovery, lower, upper, threshold, judge(lower, upper, threshold), n)
