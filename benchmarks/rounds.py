"""Things timed in turns, so that a machine whose speed drifts treats all of them alike; what comes out are ratios."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def time_rounds(calls: Mapping[str, Callable[[], Any]], rounds: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Time all calls one after the other, round by round, in every other round backwards.

    Args:
        calls: name -> what to time; a number it returns is taken as its seconds.
        rounds: timed rounds.
        warm: run one round before, untimed.

    Returns:
        name -> seconds, one per round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1 if warm else 0, rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            found = calls[name]()
            took = found if isinstance(found, float) else time.perf_counter() - started
            if turn >= 0:
                seconds[name].append(took)
    return seconds


def describe_ratio(over: list[float], under: list[float]) -> str:
    """Return the median of the rounds' ratios with their range, e.g. ``1.12 [1.08, 1.15]``."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"


def peak_memory() -> int:
    """Return the most memory this process has ever had resident, in bytes (Linux: VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
