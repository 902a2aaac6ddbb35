"""Measurements under a budget of time: a program stops itself, and a later call goes on from what it left."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TimeUp(BaseException):
    """The budget is spent; no Exception, so that nobody who handles errors takes it for one."""


@contextmanager
def limit_time(minutes: float) -> Iterator[None]:
    """Raise `TimeUp` in the block after so many minutes, or when the process is told to end."""

    def stop(*_: Any) -> None:
        raise TimeUp

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGTERM)}
    # Again after a while: where the first one lands in a destructor, it is swallowed.
    timer = signal.setitimer(signal.ITIMER_REAL, max(minutes * 60, 1e-3), 10.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Record:
    """What was measured so far, as one JSON file.

    Attributes:
        facts: whatever the program keeps there.
    """

    def __init__(self, file: Path, empty: dict[str, Any]) -> None:
        """Read the file, or begin with ``empty``."""
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else empty

    def save(self) -> None:
        """Write the file."""
        write_whole(self.file, (json.dumps(self.facts, indent=1) + "\n").encode())


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that it is there whole or as it was."""
    partial = file.with_name(f".{file.name}")
    partial.write_bytes(data)
    partial.replace(file)
