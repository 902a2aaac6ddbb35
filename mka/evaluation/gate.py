"""The gate: is enough of the base left? Decided on bounds, not on point estimates; its rules are data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mka.errors import GuardError, NumericsError
from mka.evaluation.bootstrap import CONFIDENCE, find_bounds, find_mismatch, resample_means
from mka.evaluation.evaluate import pair_scores
from mka.evaluation.metrics import FACTS, Group, find_metric, group_scores, read_fact
from mka.evaluation.rules import asks_control, check_rules, list_rules
from mka.evaluation.scores import EvalReport, Score
from mka.evaluation.served import ENGINE_FACTS, Served, read_served
from mka.recipe import Bound, GateRule, GateSettings

Verdict = Literal["pass", "fail", "undecided"]
Pair = tuple[Score | None, Score]


@dataclass(frozen=True)
class GateCheck:
    """One number against its threshold.

    Attributes:
        name: "METRIC TEXT" or "tasks"; of a bound on the value, with " value" behind it; of a fact, the fact's; where
            it is held against the control, with " against control" behind it.
        recovery: point estimate, 1 = as good as the base; None where the candidate's own value is judged.
        lower: one-sided 95 % lower confidence bound; None for a fact, which has no interval. Against the control, of
            how many times as good as the control the candidate is; 1 is a tie.
        upper: one-sided 95 % upper confidence bound; infinite if resamples leave the base without a solved item.
        threshold: smallest acceptable recovery, or the bound on the value; against the control, the control's value.
        verdict: "pass" if all between the bounds is acceptable, "fail" if nothing is, else "undecided".
        n: windows or items behind it; None for a fact.
        metric: what the rule names.
        bound: "recovery", or "least" or "most" of the candidate's own value, or "better_than" the control's; of an
            engine "must".
        value: that value; None where recovery is judged.
    """

    name: str
    recovery: float | None
    lower: float | None
    upper: float | None
    threshold: float
    verdict: Verdict
    n: int | None
    metric: str = ""
    bound: Bound = "recovery"
    value: float | None = None


@dataclass(frozen=True)
class GateDecision:
    """The verdict and the numbers it rests on.

    Attributes:
        verdict: "fail" if any check fails, else "undecided" if any is undecided, else "pass".
        checks: of each rule one per held-out source, or one over all tasks.
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
        """Return plain JSON types; a bound that the data do not give is None."""
        body = asdict(self)
        for check in body["checks"]:
            for side in ("lower", "upper"):
                if check[side] is not None and not np.isfinite(check[side]):
                    check[side] = None
        return body | {"checks": list(body["checks"])}


def decide(
    base: EvalReport,
    candidate: EvalReport,
    settings: GateSettings,
    *,
    seed: int,
    resamples: int = 2000,
    control: EvalReport | None = None,
    served: Served | None = None,
) -> GateDecision:
    """Decide whether a candidate keeps enough of its base.

    Every metric says in `mka.evaluation.metrics` how its recovery is formed. Of perplexity, per held-out source:
    ``base perplexity / candidate perplexity``, resampling windows. Of tasks: ``mean over tasks of the candidate's
    score / mean over tasks of the base's score``, each task weighing the same, resampling items within each task. Base
    and candidate share every resample (paired), so what both find hard cancels.

    Bounds are one-sided 95 % bounds of the expanded percentile bootstrap: the quantile levels are
    ``Phi(-+ sqrt(n/(n-1)) t_{0.95, n-1})`` instead of 5 % and 95 %, which makes up for the narrowness of the
    bootstrap at small n (T. Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69,
    2015). For tasks n is the smallest number of items of any task. At large n the levels are 5 % and 95 %. Facts of the
    checkpoint and speeds are no samples: they are judged as they are.

    A rule ``better_than: control`` asks whether the candidate is better than the control, by the same resamples of the
    same items with the control in the base's place: a tie has to lie outside the bound.

    Args:
        base: report of the base.
        candidate: report of the candidate, on the same windows and items.
        settings: rules; without any, thresholds of recovery of what was measured.
        seed: of the resampling.
        resamples: bootstrap resamples.
        control: report of the base rounded alike with all layers kept; needed by rules about it.
        served: what engines made of the candidate; needed by rules about them. As facts and speeds it has no interval.

    Raises:
        RecipeError: if a rule names what there is not.
        GuardError: if the reports are empty, were not measured on the same windows and items, or lack what a rule of
            the recipe is about.
        NumericsError: if a recovery is undefined: a base that solves no item, or a value that is not finite.
    """
    check_rules(settings, where="gate")
    pairs = {"base": _pair(base, candidate, "base")}
    if asks_control(settings):
        if control is None:
            raise GuardError("a rule of the gate compares with the control, of which there is no report; give one")
        pairs["control"] = _pair(control, candidate, "control")
    groups = group_scores(after for _, after in pairs["base"].values())
    checks = []
    for rule in list_rules(settings):
        if rule.metric in FACTS:
            checks.append(_check_fact(rule, candidate, control))
            continue
        if rule.metric in ENGINE_FACTS:
            checks.append(_check(rule, f"{rule.metric} {rule.engine}", read_served(served, rule), None, None, None))
            continue
        found = [group for group in groups if group.metric.subject == rule.metric]
        if settings.rules and not found:
            raise GuardError(f"the gate's rule on {rule.metric!r} finds nothing measured; evaluate on what it needs")
        for group in found:
            beside = pairs[rule.better_than or "base"]
            checks.append(_check_group(rule, group, [beside[key] for key in group.keys], seed, resamples))
    if not checks:
        raise GuardError("the gate has nothing to decide on; evaluate on held-out text or on tasks, or give it rules")
    return GateDecision(combine_verdicts([c.verdict for c in checks]), tuple(checks), CONFIDENCE, resamples, seed)


def recover_tasks(
    base: EvalReport, candidate: EvalReport, *, seed: int, resamples: int = 2000
) -> tuple[dict[str, Any], ...]:
    """Recovery of each score that the gate pools, alone, with the bounds of `decide`; nothing is judged by it.

    Returns:
        name, recovery, lower, upper (None where the data give no bound) and n per task. A task of which the base
        solves no item has no recovery and is left out.
    """
    rows = []
    for before, after in pair_scores(base, candidate):
        if before is None or not find_metric(before.metric).pooled or before.n < 2 or not any(before.items):
            continue
        recovery, draws = _recover([(before, after)], seed, resamples)
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


def _pair(base: EvalReport, candidate: EvalReport, role: str) -> dict[tuple[str, str], Pair]:
    """Match what was measured of a candidate and of what it is held against, by name and metric."""
    pairs = {(after.name, after.metric): (before, after) for before, after in pair_scores(base, candidate, role)}
    for before, after in pairs.values():
        if reason := find_mismatch(before or after, after):
            raise GuardError(f"{after.name!r}: {role} and candidate differ in {reason}; evaluate both alike")
    return pairs


def _check_group(rule: GateRule, group: Group, pairs: Sequence[Pair], seed: int, resamples: int) -> GateCheck:
    if rule.better_than is not None:
        return _check_beside(rule, group, pairs, seed, resamples)
    sizes = [after.n for _, after in pairs]
    if rule.bound == "recovery":
        name, (number, draws) = group.check, _recover(pairs, seed, resamples)
    else:
        name, (number, draws) = f"{group.check} value", _value(pairs, seed, resamples)
    if not np.isfinite(number):
        raise NumericsError(f"{name}: {rule.bound} is {number}; the base's or the candidate's score is not usable")
    lower, upper = find_bounds(draws, min(sizes))
    return _check(rule, name, number, lower, upper, sum(sizes))


def _check_beside(rule: GateRule, group: Group, pairs: Sequence[Pair], seed: int, resamples: int) -> GateCheck:
    """Hold the candidate's scores against the control's."""
    theirs = [(None, before) for before, _ in pairs if before is not None]
    if len(theirs) < len(pairs):
        raise GuardError(f"the gate's rule on {rule.metric!r}: it was not measured of the control")
    name, sizes = f"{group.check} against {rule.better_than}", [after.n for _, after in pairs]
    value, control = (_value(side, seed, resamples)[0] for side in (pairs, theirs))
    if not np.isfinite([value, control]).all():
        raise NumericsError(f"{name}: {value} and {control}; the candidate's or the control's score is not usable")
    lower, upper = find_bounds(_recover(pairs, seed, resamples, "control")[1], min(sizes))
    # As good is not better.
    verdict: Verdict = "pass" if lower > 1 else "fail" if upper <= 1 else "undecided"
    return GateCheck(name, None, lower, upper, control, verdict, sum(sizes), rule.metric, rule.bound, value)


def _check_fact(rule: GateRule, candidate: EvalReport, control: EvalReport | None) -> GateCheck:
    value = _tell_fact(candidate, rule, "candidate")
    if rule.better_than is None or control is None:
        return _check(rule, rule.metric, value, None, None, None)
    theirs, name = _tell_fact(control, rule, "control"), f"{rule.metric} against {rule.better_than}"
    better = value > theirs if FACTS[rule.metric].higher_is_better else value < theirs
    verdict: Verdict = "pass" if better else "fail"
    return GateCheck(name, None, None, None, theirs, verdict, None, rule.metric, rule.bound, value)


def _tell_fact(report: EvalReport, rule: GateRule, role: str) -> float:
    value = read_fact(report, rule.metric)
    if value is None:
        raise GuardError(f"the gate's rule on {rule.metric!r}: the report of the {role} does not tell it")
    return value


def _check(
    rule: GateRule, name: str, number: float, lower: float | None, upper: float | None, n: int | None
) -> GateCheck:
    low, high = (number if bound is None else bound for bound in (lower, upper))
    # At most t is at least -t of the number turned over.
    verdict = judge(-high, -low, -rule.threshold) if rule.bound == "most" else judge(low, high, rule.threshold)
    recovery, value = (number, None) if rule.bound == "recovery" else (None, number)
    return GateCheck(name, recovery, lower, upper, rule.threshold, verdict, n, rule.metric, rule.bound, value)


def _recover(pairs: Sequence[Pair], seed: int, resamples: int, role: str = "base") -> tuple[float, NDArray[np.float64]]:
    """Recovery of the scores of a group together, and in resamples; the role is of what is not the candidate."""
    metric = find_metric(pairs[0][1].metric)
    both = [(before, after) for before, after in pairs if before is not None]
    means, drawn = resample_means(both, seed=seed, resamples=resamples)
    if metric.scale == "linear" and not means[0] > 0:
        solved = "solves no item" if metric.resampled == "items" else "is at 0"
        raise NumericsError(
            f"{metric.subject}: the {role} {solved}, so recovery is undefined; take other tasks or more items"
        )
    return float(metric.recover(means[0], means[1])), metric.recover(drawn[:, 0], drawn[:, 1])


def _value(pairs: Sequence[Pair], seed: int, resamples: int) -> tuple[float, NDArray[np.float64]]:
    """The candidate's own value, of several names their mean, and in resamples."""
    metric = find_metric(pairs[0][1].metric)
    means, drawn = resample_means([(after,) for _, after in pairs], seed=seed, resamples=resamples)
    return float(metric.value(means[0] / len(pairs))), metric.value(drawn[:, 0] / len(pairs))
