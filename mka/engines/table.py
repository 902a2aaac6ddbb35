"""What was found of an engine, as rows for people."""

from collections.abc import Callable, Mapping
from typing import Any

from mka.engines.reference import END
from mka.engines.serve import Served, ServeReport
from mka.engines.timing import FIGURES

# Label, value, how it is written.
_FACTS: tuple[tuple[str, Callable[[Served], float | None], str], ...] = (
    ("load", lambda served: served.load_seconds, "{:.1f} s"),
    ("peak resident memory", lambda served: served.peak_bytes and served.peak_bytes / 1e6, "{:,.0f} MB"),
    ("keys and values per token", lambda served: served.kv_bytes_per_token, "{:,.0f} B"),
)


def list_rows(report: ServeReport) -> list[dict[str, str]]:
    """Return rows of quantity, base, candidate, candidate / base and what that may be at most by its size.

    Without a base, of quantity and candidate.
    """
    candidate, base = report.candidate, report.base
    if candidate is None:
        return []
    types = report.conditions.get("file_types", {})
    rows = [
        *([_row("weights in the file", types.get("base", "–"), types["candidate"], "")] if types else []),
        _row("greedy tokens as transformers'", _count(base) if base else "–", _count(candidate), ""),
        *(_compare(label, of, shape, base, candidate) for label, of, shape in _FACTS),
    ]
    for count in candidate.speed:
        for figure, (label, unit, _) in FIGURES.items():
            shape = "{:.3f} s" if unit == "s" else f"{{:,.1f}} {unit}"
            row = _compare(f"{label}, {count} at once", _median_of(count, figure), shape, base, candidate)
            if row["ratio"] and (most := report.expected.get(figure)):
                row["expected"] = f"{most:.3f}, of which {float(row['ratio']) / most:.0%}"
            rows.append(row)
    keys = ("quantity", "base", "candidate", "ratio", "expected") if base else ("quantity", "candidate")
    return [{key: row[key] for key in keys} for row in rows]


def tell_differences(report: ServeReport, decode: Callable[[int], str]) -> list[str]:
    """Say of each prompt where the candidate's tokens differ first.

    Args:
        report: the report.
        decode: makes a text of one token.
    """
    if report.candidate is None:
        return []

    def show(token: int, logprob: float | None) -> str:
        text = "the end" if token == END else repr(decode(token))
        return text if logprob is None else f"{text} ({logprob:.3f})"

    return [
        f"prompt {found.prompt}, token {found.token}: {report.engine['name']} "
        f"{show(found.engine, found.engine_logprob)}, transformers "
        f"{show(found.transformers, found.transformers_logprob)}, {found.gap:.3f} nats apart: "
        f"{'a near-tie' if found.near_tie else 'no near-tie'}"
        for found in report.candidate.agreement.differences
    ]


def _count(served: Served) -> str:
    found = served.agreement
    return f"{found.agreed} of {found.tokens}, {found.same} of {found.prompts} prompts"


def _median_of(count: str, figure: str) -> Callable[[Served], float | None]:
    def read(served: Served) -> float | None:
        found: Mapping[str, Any] = served.speed.get(count, {}).get(figure, {})
        return found.get("median")

    return read


def _compare(
    label: str, of: Callable[[Served], float | None], shape: str, base: Served | None, candidate: Served
) -> dict[str, str]:
    ours, theirs = of(candidate), of(base) if base else None
    ratio = f"{ours / theirs:.3f}" if ours and theirs else ""
    shown = ["–" if value is None else shape.format(value) for value in (theirs, ours)]
    return _row(label, shown[0], shown[1], ratio)


def _row(quantity: str, base: str, candidate: str, ratio: str) -> dict[str, str]:
    return {"quantity": quantity, "base": base, "candidate": candidate, "ratio": ratio, "expected": ""}
