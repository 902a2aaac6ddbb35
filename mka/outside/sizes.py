"""Sizes in bytes as people write them."""

import re
from collections.abc import Callable
from typing import Any

UNITS = {"B": 1, "kB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000, "TB": 1_000_000_000_000}
_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(?:([kmgt]?)(i?)b)?\s*", re.IGNORECASE | re.ASCII)


def parse_size(value: Any) -> Any:
    """Return the bytes of a size like ``250MB`` or ``0.5 GiB``; what is no text as it is, for a field to judge.

    Raises:
        ValueError: if a text is no size.
    """
    if not isinstance(value, str):
        return value
    given = _SIZE.fullmatch(value)
    if given is None and re.fullmatch(r"\s*[+-]?[\d.]+(e[+-]?\d+)?\s*", value, re.IGNORECASE | re.ASCII):
        return value  # a number, e.g. 45e3, or below 0
    if given is None or (given[3] and not given[2]):
        raise ValueError("must be a size like 90MB: a number, and B, kB, MB, GB, TB or KiB, MiB, GiB, TiB")
    power = " kmgt".index((given[2] or " ").lower())
    return float(given[1]) * (1024 if given[3] else 1000) ** power


def format_size(nbytes: float, round_off: Callable[[float], int] = round) -> str:
    """Return a size with three decimals at most, e.g. ``62.03 MB``.

    Args:
        nbytes: the size.
        round_off: how what is more exact is rounded, e.g. `math.ceil`.
    """
    unit = next((unit for unit in ("GB", "MB", "kB") if nbytes >= UNITS[unit]), "B")
    return f"{round_off(nbytes / UNITS[unit] * 1000) / 1000:,.10g} {unit}"
