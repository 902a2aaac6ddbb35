"""The candidate beside the control: the base rounded alike, all its layers kept."""

import math
from collections.abc import Mapping

from mka.evaluation.metrics import group_scores, read_fact
from mka.evaluation.scores import EvalReport
from mka.report.sizes import find_kind, read_bytes
from mka.report.speeds import SPEEDS, overlap


def has_own_control(base: EvalReport | None, control: EvalReport | None) -> bool:
    """Whether there is a control that is not the base itself."""
    return control is not None and control != base


def describe_control(control: EvalReport) -> str:
    """Say what the control is, e.g. "int8 in groups of 64, all 30 layers"."""
    facts = control.checkpoint
    return f"{facts.get('treatment') or facts.get('dtype', 'as it is')}, all {facts.get('layers', 'its')} layers"


def tell_against_control(base: EvalReport | None, candidate: EvalReport | None, control: EvalReport | None) -> str:
    """Say in one sentence what fewer layers give and cost beside rounding alone; empty where nothing was measured.

    A win is one that the figures show as they are written: in whole percents of bytes, hundredths of a speed.

    Args:
        base: tells whether the control is the base itself.
        candidate: what was made.
        control: the base rounded alike with all layers kept, or the base where nothing is rounded.
    """
    if candidate is None or control is None or not candidate.scores:
        return ""
    told: list[str] = []
    if (size := _divide_bytes(candidate, control)) is not None:
        percent = round(100 * (1 - size))
        told.append(f"{abs(percent)} % {'more' if percent < 0 else 'fewer'} bytes" if percent else "the same bytes")
    speeds = {part: ratio for part, name in SPEEDS.items() if (ratio := _divide(candidate, control, name)) is not None}
    apart = {part: ratio for part, ratio in speeds.items() if not overlap(candidate, control, SPEEDS[part])}
    if apart:
        told.append(" and ".join(f"{part} {ratio:.2f}" for part, ratio in apart.items()) + " times as fast")
    if alike := [part for part in speeds if part not in apart]:
        told.append(f"{' and '.join(alike)} not told apart, the ranges of their rounds overlap")
    wins = find_wins(candidate, control)
    quality = compare_scores(candidate, control)
    told += [text for text, _ in quality]
    own = has_own_control(base, control)
    who = "control (same rounding, all layers kept)" if own else "base, which is the control where nothing is rounded"
    verdict = _judge(wins, bool(quality) and all(better for _, better in quality))
    return f"Against the {who}: {', '.join(told)}; the candidate {verdict}."


def find_wins(candidate: EvalReport, other: EvalReport) -> dict[str, bool]:
    """Return of bytes and time whether the candidate is better, as far as it is known; speeds that agree are "time"."""
    wins: dict[str, bool] = {}
    if (size := _divide_bytes(candidate, other)) is not None:
        wins["bytes"] = round(100 * (1 - size)) > 0
    faster = {
        part: round(ratio, 2) > 1 and not overlap(candidate, other, name)
        for part, name in SPEEDS.items()
        if (ratio := _divide(candidate, other, name)) is not None
    }
    return wins | (faster if len(set(faster.values())) != 1 else {"time": all(faster.values())})


def _judge(wins: Mapping[str, bool], better: bool) -> str:
    """Say who wins, from what fewer layers are for: bytes and time."""
    won, lost = ([what for what, is_won in wins.items() if is_won is kind] for kind in (True, False))
    if won:
        return f"wins on {' and '.join(won)}" + (f", not on {' and '.join(lost)}" if lost else "")
    timed = len(wins) > 1
    said = "wins neither bytes nor time" if timed else "wins no bytes, and nothing was timed"
    return f"{said}, only quality" if better else f"{said}: the control is the better choice"


def _divide(candidate: EvalReport, control: EvalReport, name: str) -> float | None:
    """One fact of the candidate over the same of the control; None if it is not known of both."""
    ours, theirs = read_fact(candidate, name), read_fact(control, name)
    return ours / theirs if ours is not None and theirs else None


def _divide_bytes(candidate: EvalReport, control: EvalReport) -> float | None:
    kind = find_kind(candidate, control)
    ours, theirs = read_bytes(candidate, kind), read_bytes(control, kind)
    return ours / theirs if ours and theirs else None


def compare_scores(candidate: EvalReport, control: EvalReport) -> list[tuple[str, bool]]:
    """Say of each metric what it came to and whether that is better; one of several texts is told by its extremes."""
    tables = [{(score.name, score.metric): score.value for score in report.scores} for report in (candidate, control)]
    shared = [score for score in candidate.scores if (score.name, score.metric) in tables[1]]
    found: dict[str, list[float]] = {}
    ways: dict[str, bool] = {}
    for group in group_scores(shared):
        ours, theirs = (sum(table[key] for key in group.keys) / len(group.keys) for table in tables)
        pool, keys = group.metric.pooled, group.keys
        name = group.metric.name if not pool else f"mean of {len(keys)} {pool}" if len(keys) > 1 else keys[0][0]
        if theirs > 0 and math.isfinite(ours / theirs):
            found.setdefault(name, []).append(ours / theirs)
            ways[name] = group.metric.higher_is_better
    told = []
    for name, ratios in found.items():
        shown = list(dict.fromkeys(f"{ratio:,.2f}" for ratio in (min(ratios), max(ratios))))
        up = min(ratios) >= 1.005 if ways[name] else max(ratios) <= 0.995
        told.append((f"{name} {' to '.join(shown)} times as high", up))
    return told
