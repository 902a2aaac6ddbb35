"""Files that somebody hands in: read within bounds, and held against the shape they should have."""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mka.outside.printable import one_line

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter, ValidationError


Kind = TypeVar("Kind")

# Of a JSON file that a person or a command of this project wrote; a plan has kilobytes, a report some megabytes.
LONGEST_JSON = 64_000_000
# Of a number, so that floats and libraries take it; JSON's own integers have no end.
LARGEST = 2**53
# How JSON spells half of a character; most come in pairs and are one.
HALF = re.compile(r"\\u[dD][89a-fA-F]")


# How a dataclass is held against JSON: every type as it is written, no field more, no NaN and no infinity.
STRICT: "ConfigDict" = {"strict": True, "extra": "forbid", "allow_inf_nan": False}


class UnreadableError(ValueError):
    """What a file holds cannot be read; its message is one line, without the file's name."""


def read_within(path: str | Path, most: int) -> bytes:
    """Read a file that has to be small.

    Args:
        path: the file.
        most: bytes allowed.

    Raises:
        OSError: if there is none, or it cannot be read.
        UnreadableError: if it is larger, or its name is none.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(most + 1)
    except ValueError as error:  # a name with NUL or half a character
        raise UnreadableError(str(error)) from None
    if len(data) > most:
        raise UnreadableError(f"it is larger than {most / 1e6:g} MB, the most that is read")
    return data


def parse_json(data: str | bytes) -> Any:
    """Read JSON in UTF-8.

    Raises:
        UnreadableError: if it is none, is nested too deeply, or holds a number that no computer word can.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        body = json.loads(text, parse_int=_parse_int)
        if HALF.search(text):
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise UnreadableError("a text holds half of a character (a lone surrogate)") from None
    except ValueError as error:
        raise UnreadableError(one_line(error, 120)) from None
    return body


def give_reason(error: Exception) -> str:
    """Say why something cannot be read: with the class of what Python itself raised."""
    return str(error) if isinstance(error, UnreadableError) else f"{type(error).__name__}: {error}"


def read_json(path: str | Path, most: int = LONGEST_JSON) -> Any:
    """Read a JSON file; refusals are those of `read_within` and `parse_json`."""
    return parse_json(read_within(path, most))


def _parse_int(digits: str) -> int:
    if len(digits) > 20:
        raise UnreadableError(f"a number of {len(digits)} digits; the largest allowed is {LARGEST}")
    return int(digits)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def build_from(kind: type[Kind], body: Any) -> Kind:
    """Make a frozen dataclass of what JSON held, every field and entry of the type that is written there.

    Args:
        kind: the dataclass, whose ``__pydantic_config__`` says how strict it is.
        body: what `parse_json` returned.

    Raises:
        UnreadableError: naming the first field that is missing, unknown or of another type.
    """
    from pydantic import ValidationError

    try:
        adapter: TypeAdapter[Kind] = _adapter(kind)  # type: ignore[arg-type]
        return adapter.validate_json(json.dumps(body))
    except ValidationError as error:
        raise UnreadableError(explain_first(error)) from None
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None


def explain_first(error: "ValidationError") -> str:
    """Say in one line what is wrong first, where, and what stands there instead."""
    found = error.errors(include_url=False)
    first = found[0]
    place = ".".join(str(step) for step in first["loc"]) or "the whole"
    given = "" if first["type"] in ("missing", "unexpected_keyword_argument") else f", got {quote(first['input'])}"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return one_line(f"{place}: {first['msg']}{given}{more}", 240)


def quote(value: Any, most: int = 60) -> str:
    """Return how a value is written, cut to so many characters; of a large one no more than that is made."""
    if isinstance(value, str | bytes) and len(value) > most:
        value = value[:most]
    if isinstance(value, dict | list | tuple | set):
        return f"{type(value).__name__} of {len(value)}" if len(value) else repr(value)
    try:
        return one_line(repr(value), most)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"


@cache
def _adapter(kind: type[Any]) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
