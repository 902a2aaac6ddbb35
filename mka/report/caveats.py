"""The limits of the figures, each with its number."""

from mka.evaluation.metrics import FEW, HEADLINE, find_metric
from mka.evaluation.task_tables import MMLU
from mka.report.data import ReportData
from mka.report.kernels import tell_speed
from mka.report.sizes import SERVED, STORED, find_kind, read_bytes, show_bytes
from mka.report.speeds import warn_of_others


def list_caveats(data: ReportData) -> list[str]:
    """State the limits that these figures have, each with its number."""
    notes = []
    measured = data.candidate
    if not measured or not measured.scores:
        notes.append("Nothing was measured: no statement about quality is made.")
    else:
        for unit, few in FEW.items():
            counted = [score for score in measured.scores if find_metric(score.metric).resampled == unit]
            small = dict.fromkeys(f"{score.name} ({score.n})" for score in counted if score.n < few)
            if small:
                notes.append(f"Few {unit}, so read the ± before the figure: {', '.join(small)}.")
        if any(score.name.startswith(MMLU) for score in measured.scores):
            told = f"A model that has lost its language can still pick letters: read MMLU with {HEADLINE.name}."
            notes.append(told)
        notes.append("Speed was timed on the machine named under conditions; other hardware ranks differently.")
        if busy := warn_of_others(measured):
            notes.append(busy)
        if speeds := tell_speed(data.recipe):
            notes.append(speeds)
    label = f" ({data.provenance['base_model']})" if data.provenance.get("base_model") else ""
    notes.append(f"The base{label} is measured as it was loaded here; its figures are its own, not published ones.")
    if note := _split_size(data):
        notes.append(note)
    if data.candidate and find_kind(data.candidate) == SERVED:
        stored, served = (read_bytes(data.candidate, kind) for kind in (STORED, SERVED))
        if stored and served and served < stored:
            notes.append(
                f"What is not rounded is stored, and was measured, in 32 bits: {show_bytes(stored)}, of which "
                f"{show_bytes(served)} are left in 16. Sizes as served are counted; a recipe's transform cast, with "
                "dtype bfloat16, stores and measures them."
            )
    return notes


def _split_size(data: ReportData) -> str:
    """Say what two things a size ratio mixes; empty where it is of one."""
    kind = find_kind(data.base, data.candidate)
    facts = [report.checkpoint for report in (data.base, data.candidate) if report]
    if len(facts) < 2 or not all(fact.get(kind) and fact.get("parameters") for fact in facts):
        return ""
    before, after = (8 * fact[kind] / fact["parameters"] for fact in facts)
    whole, fewer = (1 - facts[1][key] / facts[0][key] for key in (kind, "parameters"))
    if abs(before - after) <= 0.05 * before:
        return ""
    told = f"{fewer:.1%} fewer parameters, and {after:.1f} instead of {before:.1f} bits per parameter"
    return f"The size ratio of {whole:.1%} mixes two things: {told}."
