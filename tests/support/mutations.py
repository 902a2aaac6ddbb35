"""Valid things made wrong: a value of a document replaced, nested, dropped or said twice, bytes cut and flipped."""

import copy
import json
import math
from random import Random
from typing import Any

TEXTS = [
    "",
    " ",
    "\0",
    "\x1b[2J",
    "a\nb",
    "\ud800",
    "é" * 300,
    "x" * 20_000,
    "../x",
    "{}",
    "null",
    "1e999",
    "%s{0}",
    "=",
    "🧊",
]
NUMBERS = [0, -1, 1, 2, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf]
OTHERS = [None, True, False, [], {}, [[]], [{}], {"": None}, [None], {"a": 1}, [0, "a"]]
STRANGE = [*TEXTS, *NUMBERS, *OTHERS]


def list_places(body: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value of a document; of long lists the first few."""
    inner = body.items() if isinstance(body, dict) else enumerate(body[:6]) if isinstance(body, list) else ()
    return [place, *(found for key, value in inner for found in list_places(value, (*place, key)))]


def mutate_document(body: Any, random: Random, strange: list[Any] = STRANGE) -> Any:
    """Return a document that differs in one to three places."""
    holder = [copy.deepcopy(body)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        place = random.choice(list_places(holder[0]))
        _change(holder, (0, *place), random, strange)
    return holder[0]


def _change(holder: Any, place: tuple[Any, ...], random: Random, strange: list[Any]) -> None:
    for step in place[:-1]:
        holder = holder[step]
    key = place[-1]
    value = holder[key]
    kind = random.choice(("replace", "replace", "replace", "drop", "double", "nest", "rename", "swap", "scale"))
    if kind == "drop" and len(place) > 1:
        del holder[key]
    elif kind == "double" and isinstance(holder, list) and len(place) > 1:
        holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(value))
    elif kind == "nest":
        for _ in range(random.choice((1, 2, 40, 400))):
            value = [value] if random.random() < 0.7 else {"a": value}
        holder[key] = value
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice([text for text in strange if isinstance(text, str)] or ["a"])] = holder.pop(key)
    elif kind == "swap" and len(holder) > 1:
        other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "scale" and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = value * random.choice((-1, 10, 1000, 0.5))
    elif kind == "scale" and isinstance(value, list) and value:
        holder[key] = value * random.choice((2, 3, 50))
    else:
        holder[key] = copy.deepcopy(random.choice(strange))


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Return bytes of which some were cut, flipped, said twice or put in."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(made) + 1)
        kind = random.choice(("cut", "flip", "double", "insert", "drop"))
        if kind == "cut":
            del made[at:]
        elif kind == "flip" and at < len(made):
            made[at] ^= 1 << random.randrange(8)
        elif kind == "double":
            made[at:at] = made[at : at + random.choice((1, 8, 100))]
        elif kind == "drop":
            del made[at : at + random.choice((1, 4, 50))]
        else:
            made[at:at] = random.choice(INSERTED)
    return bytes(made)


INSERTED = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b'"',
    b"{",
    b"[" * 2000,
    b"9" * 5000,
    b"-",
    b"1e999",
    b"NaN",
]
INSERTED += [
    b"&a [*a]",
    b"!!python/object:os.system x",
    b"? ",
    b"\t",
    b"\\ud800",
    b"\xe2\x80\xa8",
    b"\x1f\x8b",
    b": ",
    b"#",
]


def dump_json(body: Any) -> bytes:
    """Write JSON as other programs may: NaN, halves of characters, and numbers without end."""
    return json.dumps(body).encode()


def mutate_json(body: Any, random: Random) -> bytes:
    """Return JSON that was changed as a document, as bytes, or both."""
    kind = random.random()
    data = dump_json(mutate_document(body, random) if kind < 0.8 else body)
    return mutate_bytes(data, random) if kind > 0.7 else data
