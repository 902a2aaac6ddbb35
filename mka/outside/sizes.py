"""Sizes in bytes as people write them."""

import re
from collections.abc import Callable
from typing import Any

UNITS = {"B": 1, "kB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000, "TB": 1_000_000_000_000}


def parse_size(value: Any) -> Any:
    """Return the bytes of a size like ``250MB``; anything else as it is, for a field to accept or refuse."""
    given = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?B)\s*", value) if isinstance(value, str) else None
    return value if given is None else float(given[1]) * UNITS[given[2]]


def format_size(nbytes: float, round_off: Callable[[float], int] = round) -> str:
    """Return a size with three decimals at most, e.g. ``62.03 MB``.

    Args:
        nbytes: the size.
        round_off: how what is more exact is rounded, e.g. `math.ceil`.
    """
    unit = next((unit for unit in ("GB", "MB", "kB") if nbytes >= UNITS[unit]), "B")
    return f"{round_off(nbytes / UNITS[unit] * 1000) / 1000:,.10g} {unit}"
