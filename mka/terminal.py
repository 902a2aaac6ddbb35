"""The terminal: bars with a rate only where somebody watches, quiet libraries, aligned tables."""

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import click

from mka.errors import MkaError


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        document: for machines, JSON-able.
        text: for people.
        refusal: raised after both were printed; decides the exit code.
    """

    document: Any
    text: str
    refusal: MkaError | None = None


def say(line: str) -> None:
    """Print a line of progress on stderr, unless bars are off: then nobody watches."""
    if is_shown():
        click.echo(line, err=True)


def align(rows: list[list[Any]], headers: list[str], right: str = "") -> str:
    """Lay out a table with a header line.

    Args:
        rows: cells, printed as they are.
        headers: column names.
        right: one letter per column, ``r`` or ``l``; columns without one are left-aligned.
    """
    from tabulate import tabulate

    sides = tuple("right" if side == "r" else "left" for side in right.ljust(len(headers), "l"))
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=sides if rows else None)


# To be set before torch is imported. Threads that spin while they wait for one another's part of a product take the
# cores from whatever else runs: two runs at once then take several times as long as one after the other.
SHARED_MACHINE = {"OMP_WAIT_POLICY": "PASSIVE"}

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


# Modules of compressed-tensors that draw bars and offer no switch for them.
_BARS = ("quantization.lifecycle.apply", "offload.dispatch", "compressors.model_compressors.model_compressor")


@contextlib.contextmanager
def quiet_libraries(quantized: bool = False) -> Iterator[None]:
    """Keep the model libraries' own bars, reports and advice off the terminal; what matters is raised or measured.

    Args:
        quantized: whether a quantized folder will be loaded.
    """
    from unittest import mock

    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    names = ("accelerate", "compressed_tensors", "lm_eval", "datasets", "huggingface_hub")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            # Stock loading of quantized folders draws these bars and offers no switch.
            for name in _BARS if quantized else ():
                module = importlib.import_module(f"compressed_tensors.{name}")
                stack.enter_context(mock.patch.object(module, "tqdm", lambda items, **_: items))
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
