"""What the gate decided, in words: for a terminal, a page, a card and a refusal."""

from collections.abc import Mapping
from typing import Any

from mka.evaluation.metrics import FACTS
from mka.report.table import format_value

VERDICTS = {
    "pass": "every threshold is met at the worse 95 % bound",
    "undecided": "a threshold lies between the bounds: more items would decide",
    "fail": "a threshold is missed even at the better 95 % bound",
}
_SIGNS = {"recovery": "≥", "least": "≥", "most": "≤"}
_WORDS = {"recovery": "needed", "least": "at least", "most": "at most"}


def describe_check(check: Mapping[str, Any]) -> dict[str, str]:
    """Write one check of `mka.evaluation.gate.GateDecision.to_dict` as cells of a table.

    Returns:
        name, figure (the recovery or the candidate's value), bounds, threshold with its sign, n, verdict.
    """
    bound, fact = check.get("bound", "recovery"), FACTS.get(check.get("metric", ""))
    show = fact.show if fact else (lambda value: f"{value:.3f}") if bound == "recovery" else format_value
    bare = show if fact or bound == "recovery" else "{:g}".format
    lower, upper = check["lower"], check["upper"]
    figure = check["recovery"] if bound == "recovery" else check["value"]
    return {
        "name": str(check["name"]),
        "figure": show(figure),
        "bounds": "–" if lower is None else f"{show(lower)} to {'open' if upper is None else show(upper)}",
        "threshold": f"{_SIGNS[bound]} {bare(check['threshold'])}",
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
        kind = "recovery" if bound == "recovery" else "value"
        within = f"bounds [{low:>6}, {high:>6}]" if high else "no interval"
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
