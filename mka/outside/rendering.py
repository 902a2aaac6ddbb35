"""Templates and patterns that somebody else wrote, worked out in a process of their own that can be ended.

A template may loop and a pattern may look back for longer than anybody waits. What they are given goes to
`mka/outside/rendering_program.py` as one line of JSON; what does not come back in time ends that program.
"""

import contextlib
import json
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from mka.outside.reading import UnreadableError

# Seconds on the clock for one text, and of the processor for all that one template or pattern makes.
LIMIT, TOTAL = 5.0, 600.0
_PROGRAM = Path(__file__).with_name("rendering_program.py")
# Bytes that one reading from a pipe takes.
_PIPE = 1 << 16


class TooLongError(UnreadableError):
    """A template or pattern, `text`, that was not done in time."""

    def __init__(self, text: str, seconds: float, what: str) -> None:
        """Say how long it was waited for."""
        super().__init__(f"takes more than {seconds:g} s {what}")
        self.text = text


class RenderError(UnreadableError):
    """A template or pattern that failed, with the class of what was raised as `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        """Tell both."""
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind


class Renderer:
    """Renders templates and matches patterns, each within bounds of time and memory; starts its program when asked."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self._spent: dict[str, float] = {}
        self._prepared = False  # for chat templates, by importing transformers

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Render a Jinja template, which sees these values and nothing else.

        Raises:
            TooLongError: if it is not done in time.
            RenderError: if it fails, or asks for more memory than it may have.
        """
        return str(self._ask(template, "render", values=values))

    def render_chat(self, template: str, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """Render a model's chat template as transformers does; refusals are those of `render`."""
        if not self._prepared:
            self.close()
            self._prepared = True
        return str(self._ask(template, "chat", messages=messages, options=options))

    def find_all(self, pattern: str, text: str) -> list[Any]:
        """Do `re.findall`; refusals are those of `render`."""
        return [tuple(found) if isinstance(found, list) else found for found in self._ask(pattern, "find", given=text)]

    def substitute(self, pattern: str, by: str, text: str) -> str:
        """Do `re.sub`; refusals are those of `render`."""
        return str(self._ask(pattern, "substitute", by=by, given=text))

    def close(self) -> None:
        """End the program."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe and pipe.close()

    def _ask(self, text: str, what: str, **given: Any) -> Any:
        # What JSON does not have, a date say, is given as it would be written.
        request = json.dumps({"do": what, "text": text, **given}, default=str).encode() + b"\n"
        with self._lock:
            try:
                answer = self._exchange(request)
            except TimeoutError:
                raise TooLongError(text, LIMIT, "of one item") from None
        if "error" in answer:
            raise RenderError(*answer["error"])
        self._spent[text] = self._spent.get(text, 0.0) + answer["seconds"]
        if self._spent[text] > TOTAL:
            raise TooLongError(text, TOTAL, "of all items")
        return answer["made"]

    def _exchange(self, request: bytes) -> dict[str, Any]:
        done = False
        try:
            process = self._process = self._process or _start(self._prepared)
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.flush()
            answer = _read_line(process, time.monotonic() + LIMIT)
            done = True
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            answer = b""
        finally:
            if not done:
                self.close()
        if not answer:  # it died, which is what running out of memory may look like
            self.close()
            return {"error": ["MemoryError", ""]}
        return dict(json.loads(answer))


def _start(for_chats: bool) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", str(_PROGRAM), *(["chats"] if for_chats else [])]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    _read_line(process, time.monotonic() + 12 * LIMIT)  # importing is not the template's time
    return process


def _read_line(process: "subprocess.Popen[bytes]", until: float) -> bytes:
    """Read one line; an empty one if the process has ended.

    Raises:
        TimeoutError: if it does not come in time.
    """
    assert process.stdout is not None
    number = process.stdout.fileno()
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        if not select.select([number], [], [], max(0.0, until - time.monotonic()))[0]:
            process.kill()
            raise TimeoutError
        part = process.stdout.read1(_PIPE)  # type: ignore[attr-defined]
        if not part:
            return b""
        parts.append(part)
    return b"".join(parts)


class Patterns:
    """Stands in the place of the module `re` where a library uses patterns from a definition."""

    escape = staticmethod(re.escape)

    def __init__(self, renderer: Renderer) -> None:
        """Have patterns matched by a renderer."""
        self._renderer = renderer

    def compile(self, pattern: str) -> "Pattern":
        """Do `re.compile`; a pattern that is none is refused."""
        self._renderer.find_all(pattern, "")
        return Pattern(self._renderer, pattern)

    def sub(self, pattern: str, by: str, text: str) -> str:
        """Do `re.sub`."""
        return self._renderer.substitute(pattern, by, text)

    def findall(self, pattern: str, text: str) -> list[Any]:
        """Do `re.findall`."""
        return self._renderer.find_all(pattern, text)


class Pattern:
    """A pattern that was compiled."""

    def __init__(self, renderer: Renderer, pattern: str) -> None:
        """Remember both."""
        self._renderer, self.pattern = renderer, pattern

    def findall(self, text: str) -> list[Any]:
        """Do `re.findall`."""
        return self._renderer.find_all(self.pattern, text)
