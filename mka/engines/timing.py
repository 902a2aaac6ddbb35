"""Speed, from when each token of each prompt was there."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from mka.engines.exchange import Run

# Name of a figure -> its label, unit, and whether more is better.
FIGURES = {
    "first_token_seconds": ("time to first token", "s", False),
    "prefill_tokens_per_second": ("prefill", "tokens/s", True),
    "decode_tokens_per_second": ("decode", "tokens/s", True),
}


def measure_prefill(run: Run, prompt_tokens: int) -> float:
    """Return prompt tokens per second of a run that decodes one token of each: until the last prompt has been read."""
    return len(run.arrivals) * prompt_tokens / max(times[0] for times in run.arrivals)


def measure_first_token(run: Run) -> float:
    """Return the seconds until a prompt had its first token, median over the prompts."""
    return statistics.median(times[0] for times in run.arrivals)


def measure_decode(run: Run) -> float | None:
    """Return tokens per second from the moment on when every prompt has its first; None if none came after it.

    Before that moment an engine still reads prompts between the tokens.
    """
    ready = max(times[0] for times in run.arrivals)
    late = [time for times in run.arrivals for time in times if time > ready]
    return len(late) / (max(late) - ready) if late else None


def collect_figures(runs: Iterable[Run], prompt_tokens: int) -> dict[str, dict[str, Any]]:
    """Return concurrency -> figure -> median, least, most and n over the runs; the keys are texts, as JSON has them."""
    values: dict[int, dict[str, list[float]]] = {}
    for run in runs:
        if not run.arrivals or not all(run.arrivals):
            continue
        of = values.setdefault(run.concurrency, {name: [] for name in FIGURES})
        if run.new_tokens == 1:
            of["prefill_tokens_per_second"].append(measure_prefill(run, prompt_tokens))
            continue
        of["first_token_seconds"].append(measure_first_token(run))
        if (rate := measure_decode(run)) is not None:
            of["decode_tokens_per_second"].append(rate)
    return {
        str(count): {name: _summarize(found) for name, found in of.items() if found}
        for count, of in sorted(values.items())
    }


def _summarize(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}
