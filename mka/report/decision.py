"""The one sentence that a page and a terminal begin with: what is saved and by what, what is lost, use it or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mka.evaluation.metrics import FACTS, read_fact
from mka.evaluation.scores import EvalReport
from mka.evaluation.served import ENGINE_FACTS
from mka.recipe import GateSettings
from mka.report.control import compare_scores, find_wins, has_own_control
from mka.report.sizes import SERVED, find_kind, read_bytes
from mka.report.speeds import SPEEDS, overlap
from mka.report.verdict import tell_checks

# A gate that asks for less than this of its base shows how the program works, not that the model is good.
MEANINGFUL = float(GateSettings.model_fields["perplexity_recovery"].default)


@dataclass(frozen=True)
class Saving:
    """What is saved of one thing, as shares of what the base takes; the two parts add up to the whole.

    Attributes:
        what: "the bytes", "the decoding time".
        whole: 1 - candidate / base.
        bits: 1 - control / base; None where that is not known, or lies within the range of a timing.
        alone: "bits" or "depth" if the other has no part that timing tells; else empty.
    """

    what: str
    whole: float
    bits: float | None
    alone: str = ""

    @property
    def percent(self) -> int:
        """The whole, in whole percents as sentences write it."""
        return round(100 * self.whole)

    def tell(self) -> str:
        """Say the whole and, where both have a part in it, the parts."""
        way = 1 if self.percent >= 0 else -1
        told = f"{way * self.percent} % of {self.what}" + (f" (by {self.alone} alone)" if self.alone else "")
        if self.bits is None:
            return told
        bits = round(100 * self.bits)
        # Parts are written so that they add up to the whole as it is written.
        return f"{told} ({_sign(way * bits)} % by bits, {_sign(way * (self.percent - bits))} % by depth)"


def tell_decision(
    base: EvalReport | None, candidate: EvalReport | None, control: EvalReport | None, gate: Mapping[str, Any] | None
) -> str:
    """Say in one sentence what is saved (by bits and by depth), what is lost, and whether to use the candidate.

    Args:
        base: measured, or its facts alone.
        candidate: the same of what was made.
        control: the base rounded alike with all layers kept; the base where nothing is rounded; None if not measured.
        gate: the decision as `mka.evaluation.gate.GateDecision.to_dict` gives it; None if there was none.

    Returns:
        The sentence; empty if base or candidate is missing.
    """
    if base is None or candidate is None:
        return ""
    own = control if has_own_control(base, control) else None
    savings, alike = list_savings(base, candidate, own)
    saved = _join([saving.tell() for saving in savings if saving.percent > 0])
    more = _join([saving.tell() for saving in savings if saving.percent < 0])
    served = " as served in 16 bits" if find_kind(base, candidate, own) == SERVED else ""
    parts = [f"Saves {saved or 'nothing'} of the base{served}"]
    if more:
        parts.append(f"takes {more} more")
    if alike:
        parts.append(f"{_join(alike)} cannot be told from the base's")
    lost = _join([text for text, _ in compare_scores(candidate, base)])
    parts.append(f"{lost} as the base's" if lost else "what is lost was not measured")
    return f"{'; '.join(parts)}: {advise(base, candidate, own, gate)}."


def list_savings(base: EvalReport, candidate: EvalReport, control: EvalReport | None) -> tuple[list[Saving], list[str]]:
    """Return what is saved of bytes and times, and the times of which the ranges overlap with the base's."""
    sides = [report for report in (base, candidate, control) if report is not None]
    kind = find_kind(*sides)
    sizes = [read_bytes(report, kind) for report in (base, candidate, control)]
    savings, alike = [], []
    if sizes[0] and sizes[1]:
        bits = 1 - sizes[2] / sizes[0] if sizes[2] else None
        savings.append(Saving("the bytes", 1 - sizes[1] / sizes[0], bits))
    for part, name in SPEEDS.items():
        # A time is the inverse of a speed.
        times = [1 / rate if report and (rate := read_fact(report, name)) else None for report in (base, candidate)]
        if times[0] is None or times[1] is None:
            continue
        if overlap(base, candidate, name):
            alike.append(f"{part} speed")
            continue
        rate = read_fact(control, name) if control else None
        bits, alone = None, ""
        if control is not None and rate:
            same_as_base, same_as_ours = (overlap(control, report, name) for report in (base, candidate))
            if not same_as_base and not same_as_ours:
                bits = 1 - 1 / rate / times[0]
            elif same_as_base != same_as_ours:
                alone = "depth" if same_as_base else "bits"
        savings.append(Saving(f"the {part} time", 1 - times[1] / times[0], bits, alone))
    return savings, alike


def advise(base: EvalReport, candidate: EvalReport, control: EvalReport | None, gate: Mapping[str, Any] | None) -> str:
    """Say whether to use the candidate: by the gate, and beside a control of its own, or the base if there is none."""
    if not candidate.scores:
        return "measure it before you use it"
    if gate is None:
        return "no gate judged it, decide by the figures"
    verdict = gate["verdict"]
    if verdict == "fail":
        return f"do not use it, the gate refused it ({tell_checks(gate, 'fail')})"
    if verdict == "undecided":
        return (
            f"do not use it yet, the gate is undecided ({tell_checks(gate, 'undecided')}) and more items would decide"
        )
    # Where all layers are kept, the candidate is rounded alike and nothing but the base is left to beat.
    deep = read_fact(candidate, "layers") != read_fact(base, "layers")
    rival = control if control is not None and deep else base
    name = "the control (same rounding, all layers kept)" if rival is control else "the base"
    won = [what for what, is_won in find_wins(candidate, rival).items() if is_won]
    quality = compare_scores(candidate, rival)
    better = bool(quality) and all(is_better for _, is_better in quality)
    if not won and not better:
        nearer = ", which is nearer to the base" if rival is control else ""
        return f"do not use it, it wins neither bytes nor time against {name}{nearer}"
    if asks_too_little(gate) and not _found_more(gate):
        return f"a demonstration and no model to use, since its gate asks for {_tell_asked(gate)}"
    if not won:
        return f"use it for its quality alone, it wins neither bytes nor time against {name}"
    one = len(won) == 1 and won[0] != "bytes"
    counts, does = ("counts", "it does") if one else ("count", "they do")
    return f"use it where {_join(won)} {counts}" + ("" if better else f", and {name} where {does} not")


def tell_demonstration(gate: Mapping[str, Any] | None) -> str:
    """Say that a gate asks for too little to prove anything, and what it asks; empty if it does not."""
    if gate is None or not asks_too_little(gate):
        return ""
    return (
        f"A demonstration: its gate asks for {_tell_asked(gate)}; less than {MEANINGFUL:g} of the base shows how the "
        "program works, not that a model is good."
    )


def asks_too_little(gate: Mapping[str, Any]) -> bool:
    """Whether a gate asks for less of the base than `MEANINGFUL`, or of nothing that was measured but facts."""
    asked = _list_asked(gate)
    judged = [check for check in gate["checks"] if check.get("metric") not in (*FACTS, *ENGINE_FACTS)]
    return min(asked) < MEANINGFUL if asked else not judged


def _list_asked(gate: Mapping[str, Any]) -> list[float]:
    """The recoveries that a gate asks for, sorted."""
    checks = gate["checks"]
    return sorted({float(check["threshold"]) for check in checks if check.get("bound", "recovery") == "recovery"})


def _tell_asked(gate: Mapping[str, Any]) -> str:
    asked = [f"{least:g}" for least in _list_asked(gate) if least < MEANINGFUL]
    return f"{_join(asked)} of the base" if asked else "no quality"


def _found_more(gate: Mapping[str, Any]) -> bool:
    """Whether a gate that asked for more would have passed what was found."""
    lower = [check["lower"] for check in gate["checks"] if check.get("bound", "recovery") == "recovery"]
    return bool(lower) and all(bound is not None and bound >= MEANINGFUL for bound in lower)


def _sign(percent: int) -> str:
    return f"−{-percent}" if percent < 0 else str(percent)


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
