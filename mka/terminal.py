"""The terminal: bars with a rate only where somebody watches, quiet libraries, aligned tables."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mka.errors import MkaError, explain_missing
from mka.outside.printable import describe_error, hide_passwords, make_printable

if TYPE_CHECKING:
    from mka.outside.rendering import Renderer

# Exit code of what ^C or SIGTERM ended.
INTERRUPTED = 130
# Files with the traceback of something nobody foresaw; older ones than the last few go.
TRACEBACK, KEPT_TRACEBACKS = "traceback-", 20


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
    """Print a line of progress on stderr, unless progress was switched off."""
    if _SHOWN.get() is not False:
        click.echo(make_printable(line), err=True)


def say_stage(name: str, seconds: float, reused: bool, why: str) -> None:
    """Say in one line that a stage has ended: in a terminal and in a log, of a command and of a flow, the same."""
    say(describe_stage(name, seconds, reused, why))


def describe_stage(name: str, seconds: float, reused: bool, why: str) -> str:
    """Return the line of a stage that has ended."""
    took, how = ("–", "reused") if reused else (f"{seconds:,.1f} s", "computed")
    return f"{name:<20} {took:>10}  {how}: {why}"


def explain_unforeseen(error: BaseException, folder: Path) -> str:
    """Say in one line what nobody foresaw, and where its traceback is; see `keep_traceback`.

    What lacks a library of an extra is told which.
    """
    if (missing := explain_missing(error)) is not None:
        return str(missing)
    where = keep_traceback(error, folder)
    return f"unforeseen: {describe_error(error)}; {where}; please report it"


def keep_traceback(error: BaseException, folder: Path) -> str:
    """Write the traceback of an exception to a file of the user's alone, and say where it is.

    Args:
        error: the exception.
        folder: where the file shall be, if it is a folder that can be written; else the system's temporary folder.
    """
    import tempfile
    import time
    import traceback

    told = hide_passwords("".join(traceback.format_exception(error)))
    for place in (folder, Path(tempfile.gettempdir())):
        try:
            handle, name = tempfile.mkstemp(".txt", time.strftime(f"{TRACEBACK}%Y%m%d-%H%M%S-"), place)
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(told)
            for old in sorted(place.glob(f"{TRACEBACK}*.txt"))[:-KEPT_TRACEBACKS]:
                old.unlink(missing_ok=True)
        except (OSError, ValueError):
            continue
        return f"traceback in {name}"
    return "its traceback could not be written anywhere"


def align(rows: list[list[Any]], headers: list[str], right: str = "") -> str:
    """Lay out a table with a header line.

    Args:
        rows: cells, printed as they are but for control characters.
        headers: column names.
        right: one letter per column, ``r`` or ``l``; columns without one are left-aligned.
    """
    from tabulate import tabulate

    shown = [[make_printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    sides = tuple("right" if side == "r" else "left" for side in right.ljust(len(headers), "l"))
    return tabulate(shown, headers, tablefmt="simple", disable_numparse=True, colalign=sides if rows else None)


# To be set before torch is imported. Threads that spin while they wait for one another's part of a product take the
# cores from whatever else runs: two runs at once then take several times as long as one after the other.
SHARED_MACHINE = {"OMP_WAIT_POLICY": "PASSIVE"}

_SHOWN: ContextVar[bool | None] = ContextVar("progress shown", default=None)


def is_shown() -> bool:
    """Whether bars are drawn: a log that is no terminal gets lines alone."""
    shown = _SHOWN.get()
    return sys.stderr.isatty() if shown is None else shown


@contextmanager
def showing(shown: bool | None) -> Iterator[None]:
    """Within the block draw bars, or say nothing of progress; None: bars in a terminal only, and lines."""
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
        disable=not is_shown(),
        **_pace(),
    )
    with bar:
        yield bar.update


def _pace() -> dict[str, Any]:
    """Where a bar is drawn over, once it has ended a line says so in its place."""
    return {"mininterval": 0.5, "leave": False} if sys.stderr.isatty() else {"mininterval": 10}


# Names of libraries that are replaced where they offer no switch, by what is then kept off the terminal. The only such
# table: a library that renames one of them fails a test.
REPLACED = {
    "bars of quantized folders": (
        "compressed_tensors.quantization.lifecycle.apply.tqdm",
        "compressed_tensors.offload.dispatch.tqdm",
        "compressed_tensors.compressors.model_compressors.model_compressor.tqdm",
    ),
    "bars of tasks": ("lm_eval.api.task.tqdm", "lm_eval.api.model.tqdm", "lm_eval.models.huggingface.tqdm"),
    # lm-eval's account of git and the machine costs seconds and prints; ours is in the report's conditions.
    "account of tasks": ("lm_eval.evaluator.get_git_commit_hash", "lm_eval.evaluator.add_env_info"),
    # Whoever writes a task writes templates and patterns, which could otherwise call anything and take for ever.
    "templates of tasks": ("lm_eval.utils.apply_template",),
    "patterns of tasks": ("lm_eval.filters.extraction.re", "lm_eval.api.metrics.re"),
    # Not for the terminal: of weights that stay on disk transformers draws values, and of whole numbers it cannot.
    "first values": ("transformers.initialization.normal_",),
}


@contextmanager
def _replacing(what: str, by: Any) -> Iterator[None]:
    from unittest import mock

    with contextlib.ExitStack() as stack:
        for name in REPLACED[what]:
            stack.enter_context(mock.patch(name, by))
        yield


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def quiet_libraries(quantized: bool = False) -> Iterator[None]:
    """Keep the model libraries' own bars, reports and advice off the terminal; what matters is raised or measured.

    Args:
        quantized: whether a quantized folder will be loaded.
    """
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    drawn = _replacing("bars of quantized folders", lambda items, **_: items)
    try:
        with (
            _errors_only("accelerate", "compressed_tensors", "lm_eval", "datasets", "huggingface_hub"),
            drawn if quantized else contextlib.nullcontext(),
        ):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def without_first_values() -> Iterator[None]:
    """Have stock loading draw no values for weights within the block: those that stay on disk have theirs there."""
    with _replacing("first values", lambda tensor, *_, **__: tensor):
        yield


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Draw the hub client's bars only where bars are drawn, and keep its advice off the terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    if not is_shown():
        disable_progress_bars()
    try:
        with _errors_only("huggingface_hub", "httpx2"):
            yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def quiet_lm_eval(progress: bool) -> "Iterator[Renderer]":
    """Draw one bar for all requests, if any, instead of one per step and task, and warn of no item.

    Templates and patterns of tasks are worked out by the renderer that is handed over: they see their item and nothing
    else, within bounds of time and memory.
    """
    import datasets
    from tqdm import tqdm

    from mka.outside.rendering import Patterns, Renderer

    renderer = Renderer()

    def bar(*args: Any, desc: str = "", **options: Any) -> Any:
        shown = progress and desc.startswith("Running")
        style = {"desc": f"{'tasks':<22}", "unit": " req", **_pace()}
        return tqdm(*args, **{**options, **style, "disable": not shown})

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with (
            _errors_only("lm_eval"),
            _replacing("account of tasks", lambda *_: None),
            _replacing("bars of tasks", bar),
            _replacing("templates of tasks", renderer.render),
            _replacing("patterns of tasks", Patterns(renderer)),
        ):
            yield renderer
    finally:
        renderer.close()
        if bars:
            datasets.enable_progress_bars()


def interrupt_on_sigterm() -> None:
    """Have the signal that ends a job do what ^C does: what is half done is removed, and how to go on is said."""
    import signal
    import threading

    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _interrupt)


def was_interrupted(error: BaseException | None, *signals: type[BaseException]) -> bool:
    """Whether it is ^C or what SIGTERM became, or what a library that was being left on one of these tripped over.

    Args:
        error: what ended a command.
        signals: what else somebody makes of SIGTERM.
    """
    signals = (KeyboardInterrupt, *signals)
    while error is not None and not isinstance(error, (*signals, MkaError, OSError)):
        error = error.__cause__ or error.__context__
    return isinstance(error, signals)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
