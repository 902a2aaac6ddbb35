"""What the gate decided, in words: for a terminal, a page, a card and a refusal."""

from collections.abc import Mapping
from typing import Any

from mka.evaluation.metrics import FACTS
from mka.report.table import format_value

VERDICTS = {
    "pass": "every lower 95 % bound reaches its threshold",
    "undecided": "a threshold lies between the bounds: more items would decide",
    "fail": "an upper 95 % bound stays below its threshold",
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
    lower, upper = check["lower"], check["upper"]
    figure = check["recovery"] if bound == "recovery" else check["value"]
    return {
        "name": str(check["name"]),
        "figure": show(figure),
        "bounds": "–" if lower is None else f"{show(lower)} to {'open' if upper is None else show(upper)}",
        "threshold": f"{_SIGNS[bound]} {show(check['threshold'])}",
        "n": "–" if check.get("n") is None else str(check["n"]),
        "verdict": str(check["verdict"]),
    }


def describe_decision(decision: Mapping[str, Any]) -> list[str]:
    """Return aligned lines for a terminal: the verdict, then one line per check.

    Args:
        decision: of `mka.evaluation.gate.GateDecision.to_dict`.
    """
    checks = decision["checks"]
    width = max(len(check["name"]) for check in checks)
    bounds = f"one-sided {decision['confidence']:.0%} bounds, {decision['resamples']} paired resamples"
    lines = [f"gate: {decision['verdict']} ({bounds})"]
    for check in checks:
        bound, told = check.get("bound", "recovery"), describe_check(check)
        low, _, high = told["bounds"].partition(" to ")
        within = f"bounds [{low:>6}, {high:>6}]" if high else "no interval"
        kind = "recovery" if bound == "recovery" else "value"
        needed = f"{_WORDS[bound]} {told['threshold'].partition(' ')[2]:>5}"
        lines.append(
            f"  {told['name']:<{width}}  {kind:<8} {told['figure']:>6}  {within:<23}  {needed}  n {told['n']:>6}"
            f"  {told['verdict']}"
        )
    return lines


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
