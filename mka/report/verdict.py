"""What the gate decided, in words: for a terminal, a page, a card and a refusal."""

from collections.abc import Mapping
from typing import Any

from mka.evaluation.metrics import FACTS, find_subject
from mka.report.table import format_value

VERDICTS = {
    "pass": "every threshold is met at the worse 95 % bound",
    "undecided": "a threshold lies between the bounds: more items would decide",
    "fail": "a threshold is missed even at the better 95 % bound",
}
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
