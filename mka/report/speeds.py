"""Speeds for people: each with the range of its rounds, compared only where the ranges lie apart."""

from collections.abc import Mapping
from typing import Any

from mka.evaluation.metrics import FACTS, read_fact
from mka.evaluation.scores import EvalReport
from mka.evaluation.speed import LEAST, MOST, TIMING
from mka.outside.reading import is_number

# What is timed, as sentences call it.
SPEEDS = {"prefill": "prefill_tokens_per_second", "decoding": "decode_tokens_per_second"}
# Stands in the place of a ratio.
OVERLAP = "ranges overlap"
# From this share of its cores on that other programs keep busy, a machine is called so.
BUSY = 0.1
_OTHERS = "others_busy_cores"


def find_range(report: EvalReport, name: str) -> tuple[float, float] | None:
    """Return the slowest and the fastest round of a speed; None where only one figure was kept."""
    ends = report.speed.get(name + LEAST), report.speed.get(name + MOST)
    return None if ends[0] is None or ends[1] is None else (float(ends[0]), float(ends[1]))


def show_speed(report: EvalReport, name: str) -> str | None:
    """Write a speed with its range, e.g. "21.5 (20.9 to 22.0) tokens/s"; None if it was not timed."""
    if (value := read_fact(report, name)) is None:
        return None
    shown, ends = FACTS[name].show(value), find_range(report, name)
    if ends is None:
        return shown
    figure, _, unit = shown.partition(" ")
    least, most = (FACTS[name].show(end).partition(" ")[0] for end in ends)
    return f"{figure} ({least} to {most}) {unit}"


def overlap(one: EvalReport, other: EvalReport, name: str) -> bool:
    """Whether the ranges of two speeds share a figure, so that neither is shown to be the faster one."""
    ours, theirs = find_range(one, name), find_range(other, name)
    return ours is not None and theirs is not None and ours[0] <= theirs[1] and theirs[0] <= ours[1]


def describe_rounds(report: EvalReport | None) -> str:
    """Say what a speed's figures are; empty where nothing was timed or no range was kept."""
    found = _read_timing(report)
    return f"A speed is the median of {found['rounds']:.0f} rounds, with the slowest and the fastest." if found else ""


def warn_of_others(report: EvalReport | None) -> str:
    """Say that the machine was busy while it was timed; empty if it was not, or nobody knows."""
    found = _read_timing(report)
    others, cores = float(found.get(_OTHERS, 0)), float(found.get("cores", 1))
    if others < BUSY * cores:
        return ""
    return f"The machine was busy while speeds were timed: other programs kept {others:.1f} of {cores:.0f} cores."


def _read_timing(report: EvalReport | None) -> Mapping[str, Any]:
    found = report.conditions.get(TIMING) if report else None
    # Conditions are whatever a report's file says.
    if not isinstance(found, Mapping) or not all(is_number(found.get(key)) for key in ("rounds", "cores", _OTHERS)):
        return {}
    return found
