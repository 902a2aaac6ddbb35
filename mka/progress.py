"""Progress bars with a rate, on stderr, only where somebody watches or asked for them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SHOWN: ContextVar[bool] = ContextVar("progress shown", default=True)


def is_shown() -> bool:
    """Whether bars are drawn."""
    return _SHOWN.get()


@contextmanager
def showing(shown: bool) -> Iterator[None]:
    """Draw bars, or leave them out, within the block."""
    token = _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def show_progress(
    description: str, total: int | None, unit: str, *, scale: bool = False
) -> Iterator[Callable[[int], Any]]:
    """Yield ``advance(n)`` that moves a bar with rate and remaining time.

    Args:
        description: what is being done.
        total: units in all; None if unknown.
        unit: what is counted, e.g. "tok".
        scale: print large counts as k, M, G (for bytes).
    """
    from tqdm import tqdm

    bar = tqdm(
        total=total,
        desc=f"{description:<22}",
        unit=unit if scale else f" {unit}",
        unit_scale=scale,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        leave=True,
        disable=not is_shown(),
    )
    with bar:
        yield bar.update
