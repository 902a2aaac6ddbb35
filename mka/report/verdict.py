"""What the gate decided, in words: for a terminal, a page, a card and a refusal."""

import math
from collections.abc import Mapping
from typing import Any

from mka.errors import GateRefused, GateUndecided
from mka.evaluation.metrics import FACTS, find_subject
from mka.report.table import format_value

VERDICTS = {
    "pass": "every threshold is met at the worse 95 % bound",
    "undecided": "a threshold lies between the bounds: more items would decide",
    "fail": "a threshold is missed even at the better 95 % bound",
}
# What of a recipe's `evaluation` says how much is measured, by what a metric is measured on.
_AMOUNTS = {"texts": "text_tokens", "tasks": "tasks"}
# Times as many items as were measured that a person might still wait for.
_MOST_TIMES = 100
_SIGNS = {"recovery": "≥", "least": "≥", "most": "≤"}
_WORDS = {"recovery": "needed", "least": "at least", "most": "at most", "better_than": "better than", "must": "must"}


def describe_check(check: Mapping[str, Any]) -> dict[str, str]:
    """Write one check of `mka.evaluation.gate.GateDecision.to_dict` as cells of a table.

    Returns:
        name, figure (the recovery or the candidate's value), bounds, threshold with its sign, n, verdict. Against the
        control, the threshold is its value, and the bounds are of how many times as good the candidate is.
    """
    bound, metric = check.get("bound", "recovery"), check.get("metric", "")
    fact, lower, upper = FACTS.get(metric), check["lower"], check["upper"]
    show = fact.show if fact else (lambda value: f"{value:.3f}") if bound == "recovery" else format_value
    bare = show if fact or bound == "recovery" else "{:g}".format
    within, needed, tie = show, f"{_SIGNS.get(bound)} {bare(check['threshold'])}", ""
    if bound == "must":
        show, needed = (lambda value: "loads" if value else "does not load"), "must load"
    if bound == "better_than":
        row = fact or find_subject(metric)
        within, tie = "{:.3f}".format, " (1: a tie)"
        needed = f"{'>' if row and row.higher_is_better else '<'} control {show(check['threshold'])}"
    return {
        "name": str(check["name"]),
        "figure": show(check["recovery"] if bound == "recovery" else check["value"]),
        "bounds": "–" if lower is None else f"{within(lower)} to {'open' if upper is None else within(upper)}{tie}",
        "threshold": needed,
        "n": "–" if check.get("n") is None else str(check["n"]),
        "verdict": str(check["verdict"]),
    }


def describe_decision(decision: Mapping[str, Any]) -> list[str]:
    """Return aligned lines for a terminal: the verdict, then one line per check.

    Args:
        decision: of `mka.evaluation.gate.GateDecision.to_dict`.
    """
    told = []
    for check in decision["checks"]:
        bound, row = check.get("bound", "recovery"), describe_check(check)
        low, _, high = row["bounds"].partition(" to ")
        high, _, tie = high.partition(" ")
        kind = "recovery" if bound == "recovery" else "value"
        within = f"bounds [{low:>6}, {high:>6}] {tie}".rstrip() if high else "no interval"
        needed = f"{_WORDS[bound]} {row['threshold'].partition(' ')[2]}"
        told.append((row["name"], f"{kind:<8} {row['figure']:>6}", within, needed, f"n {row['n']:>6}", row["verdict"]))
    widths = [max(map(len, column)) for column in zip(*told, strict=True)]
    bounds = f"one-sided {decision['confidence']:.0%} bounds, {decision['resamples']} paired resamples"
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in told]
    return [f"gate: {decision['verdict']} ({bounds})", *(f"  {line}" for line in lines)]


def tell_checks(decision: Mapping[str, Any], verdict: str | None = None) -> str:
    """Say in one line what was found and what was needed, of every check or of those with one verdict."""
    told = []
    for check in decision["checks"]:
        if verdict not in (None, check["verdict"]):
            continue
        row = describe_check(check)
        within = "" if row["bounds"] == "–" else f" [{row['bounds']}]"
        told.append(f"{row['name']} {row['figure']}{within}, needed {row['threshold']}")
    return "; ".join(told)


def count_needed(check: Mapping[str, Any]) -> int | None:
    """Return about how many windows or items would decide an undecided check, if the estimate stays where it is.

    Bounds close in with the root of their number. None if the check has no interval, or so many cannot be measured.
    """
    lower, upper, n = check["lower"], check["upper"], check.get("n")
    if lower is None or upper is None or not n:
        return None
    beside = check.get("bound") == "better_than"  # as good as the control is 1
    threshold = 1.0 if beside else check["threshold"]
    estimate = (lower + upper) / 2 if beside else check["value"] if check.get("recovery") is None else check["recovery"]
    towards, distance = (lower if estimate > threshold else upper), estimate - threshold
    if not distance or abs(times := (estimate - towards) / distance) > math.sqrt(_MOST_TIMES):
        return None
    return math.ceil(n * times**2)


def tell_needed(check: Mapping[str, Any]) -> str:
    """Say what would decide an undecided check: about how many items, and which key of a recipe asks for them."""
    row, needed = find_subject(check.get("metric", "")), count_needed(check)
    if row is None:
        return "more of what was measured would decide"
    key = f"evaluation.{row.asked or _AMOUNTS[row.on]}"
    if needed is None:
        return f"it lies so near that {_MOST_TIMES} times as many {row.resampled} would not decide"
    return f"about {needed:,} {row.resampled} would decide, {check['n']:,} were measured ({key})"


def refuse_verdict(decision: Mapping[str, Any] | None, where: object) -> GateRefused | GateUndecided | None:
    """Return what a verdict other than a pass ends a command with, to be raised once it has shown the result.

    Args:
        decision: of `mka.evaluation.gate.GateDecision.to_dict`; None if there was nothing to decide on.
        where: the evidence.
    """
    verdict = decision["verdict"] if decision is not None else "pass"
    if decision is None or verdict == "pass":
        return None
    if verdict == "fail":
        return GateRefused(f"the gate failed this candidate ({tell_checks(decision, 'fail')}); evidence in {where}")
    told = [
        f"{tell_checks({'checks': [check]})}: {tell_needed(check)}"
        for check in decision["checks"]
        if check["verdict"] == "undecided"
    ]
    return GateUndecided(f"the gate is undecided ({'; '.join(told)}); evidence in {where}")
