"""A program of an engine run to its end: bounded in time and memory, with nothing of it left behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mka.engines import Engine
from mka.engines.exchange import IMPORT, Answer, Request, read_answer
from mka.errors import EngineError, EngineFault
from mka.outside.printable import one_line
from mka.outside.reading import UnreadableError, give_reason

# Seconds between two looks at the memory; what is allocated for less is not seen.
_LOOK = 0.2
# Bytes of a log that are searched for a reason, from its end.
_LOG_END = 1 << 20
_MEMORY = re.compile(r"out of memory|not enough memory|insufficient memory|cannot allocate|bad_alloc|MemoryError", re.I)


@dataclass(frozen=True)
class Bounds:
    """What a program may use.

    Attributes:
        seconds: until it is ended.
        memory: bytes resident in it and its children; what is more ends it.
    """

    seconds: float
    memory: int


def run_program(
    engine: Engine, python: Path, request: Request, folder: Path, bounds: Bounds
) -> tuple[Answer, int | None]:
    """Run an engine's program on one request.

    Args:
        engine: the engine.
        python: of the environment that has it.
        request: what to do; its ``log`` is where stderr goes.
        folder: an existing folder for request, answer and log.
        bounds: what it may use.

    Returns:
        The answer, and the most bytes that were resident in the program and its children; None if it ended before it
        could be looked at.

    Raises:
        EngineFault: if the engine refused the model or failed on it, with its own reason.
        EngineError: if it could not be started, died, hung, or ran out of memory.
    """
    folder = folder.absolute()  # the program runs in it
    asked, place = folder / "request.json", folder / "answer.json"
    place.unlink(missing_ok=True)
    asked.write_text(json.dumps(request.to_dict()), encoding="utf-8")
    command = [str(python), "-I", str(engine.path), str(asked), str(place)]
    with Path(request.log).open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=_environment(request.threads),
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"{engine.name}: {python} cannot be run: {error.strerror or error}") from None
        peak = 0
        try:
            for peak in _watch(process, bounds.seconds):
                if peak > bounds.memory:
                    raise EngineError(
                        f"{engine.name} ran out of memory: {peak / 1e9:.1f} GB are resident and "
                        f"{bounds.memory / 1e9:.1f} allowed; ask for shorter prompts or fewer at once, or allow more "
                        "by --memory"
                    )
        except TimeoutError:
            raise EngineError(
                f"{engine.name} did not answer within {bounds.seconds:g} s and was ended; it last said: "
                f"{_last_line(request.log)}; allow more by --limit"
            ) from None
        finally:
            _end(process)
    return _judge(engine, request, place, process.returncode), peak or None


def _environment(threads: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # A model that lies on the disk needs no hub.
    return kept | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _watch(process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[int]:
    """Wait for a process; yields the most bytes resident so far, again and again.

    Raises:
        TimeoutError: if it is not done in time.
    """
    peak, until = 0, time.monotonic() + seconds
    while True:
        peak = max(peak, _resident(process.pid))
        yield peak
        try:
            process.wait(_LOOK)
            return
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                raise TimeoutError from None


def _resident(pid: int) -> int:
    """Sum the bytes resident in a process and its children."""
    import psutil

    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += member.memory_info().rss
    return total


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started, also what outlived it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _judge(engine: Engine, request: Request, place: Path, code: int) -> Answer:
    try:
        answer = read_answer(place)
    except FileNotFoundError:
        said = find_reason(engine, request.log)
        if code < 0:
            killed = signal.Signals(-code).name
            hint = "; a system that runs out of memory does that" if killed == "SIGKILL" else ""
            raise EngineError(f"{engine.name} was killed by {killed}{hint}; it last said: {said}") from None
        raise EngineError(f"{engine.name} ended with code {code} and no answer; it last said: {said}") from None
    except (OSError, UnreadableError) as error:
        raise EngineError(f"{engine.name} gave an answer that cannot be read ({give_reason(error)})") from None
    if answer.error is None:
        return answer
    reason = find_reason(engine, request.log, answer.error)
    if answer.stage == IMPORT:
        raise EngineError(f"{engine.name} cannot be used from its environment: {reason}; {engine.suggest_python()}")
    if _MEMORY.search(reason):
        raise EngineError(f"{engine.name} ran out of memory: {reason}")
    doing = {"load": "does not load the model", "run": "loads the model and fails on it"}.get(answer.stage, "failed")
    raise EngineFault(f"{engine.name} {doing}: {reason}")


def find_reason(engine: Engine, log: str | Path, error: str | None = None) -> str:
    """Return why an engine failed, in its own words and one line.

    Args:
        engine: whose log says it in a known way, or
        log: whose last line is taken, if there is no
        error: that its program caught.
    """
    text = _read_end(log)
    for pattern in engine.reasons:
        if match := re.search(pattern, text, re.MULTILINE):
            return one_line(match[1], 300)
    return one_line(error, 300) if error else _last_line(log)


def _last_line(log: str | Path) -> str:
    lines = [line for line in _read_end(log).splitlines() if line.strip()]
    return one_line(lines[-1], 200) if lines else "nothing"


def _read_end(log: str | Path) -> str:
    with Path(log).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END))
        return file.read().decode("utf-8", errors="replace")
