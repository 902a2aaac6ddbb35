"""What a program of an engine is asked and what it answers: two JSON files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mka.outside.reading import STRICT, build_from, read_json

# Of an answer: token times, and a few alternatives for each token of eight prompts.
LONGEST_ANSWER = 256_000_000
IMPORT, LOAD, RUN = "import", "load", "run"


@dataclass(frozen=True)
class Request:
    """What an engine shall do.

    Attributes:
        model: the folder or file that it loads.
        dtype: "float32", "bfloat16" or "float16", of its arithmetic.
        threads: processor threads.
        context: tokens that one sequence has room for.
        sequences: sequences at once, at most.
        kv_bytes: bytes for keys and values, where the engine asks for a number.
        log: file that has what the program said on stderr.
        texts: texts that it shall tokenize itself, if it can.
        prompts: token ids of each prompt that it shall continue greedily.
        new_tokens: tokens it shall continue each by.
        ends: token ids that end a text.
        alternatives: most likely tokens that it shall name beside each chosen one.
        timed_prompts: token ids of prompts, as many as ``sequences``, for the timing.
        timed_tokens: tokens decoded in the timing.
        concurrency: numbers of prompts that are timed at once; none: nothing is timed.
        repeats: timed repeats of each.
    """

    model: str
    dtype: str
    threads: int
    context: int
    sequences: int
    kv_bytes: int
    log: str
    texts: Sequence[str] = ()
    prompts: Sequence[Sequence[int]] = ()
    new_tokens: int = 0
    ends: Sequence[int] = ()
    alternatives: int = 5
    timed_prompts: Sequence[Sequence[int]] = ()
    timed_tokens: int = 0
    concurrency: Sequence[int] = ()
    repeats: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Continuation:
    """What an engine continued one prompt by.

    Attributes:
        tokens: the chosen ids, without one that ended the text.
        ended: the engine ended the text itself.
        logprobs: natural log-probability of each, and of the end; None where the engine gives none that is finite.
        others: beside each the most likely ids with theirs, ``[id, log-probability]``.
    """

    tokens: tuple[int, ...]
    ended: bool
    logprobs: tuple[float | None, ...]
    others: tuple[tuple[tuple[int, float], ...], ...]

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Run:
    """One timing of several prompts at once.

    Attributes:
        concurrency: the number of prompts.
        new_tokens: tokens decoded of each.
        arrivals: of each prompt, when each of its tokens was there: seconds since all were handed over.
    """

    concurrency: int
    new_tokens: int
    arrivals: tuple[tuple[float, ...], ...]

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Answer:
    """What an engine did.

    Attributes:
        stage: how far it came: "import", "load" or "run".
        error: its own reason for not coming further; None if all was done.
        version: of the engine.
        device: what it computed on.
        load_seconds: from the folder to being able to serve.
        kv_bytes: bytes set aside for keys and values.
        kv_tokens: tokens these hold.
        read: token ids it makes of each text itself; None if it was not asked or reads token ids only.
        continuations: one per prompt.
        runs: timings, in the order they were taken.
    """

    stage: str
    error: str | None = None
    version: str = ""
    device: str = ""
    load_seconds: float | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    read: tuple[tuple[int, ...], ...] | None = None
    continuations: tuple[Continuation, ...] = field(default=())
    runs: tuple[Run, ...] = field(default=())

    __pydantic_config__ = STRICT


def read_answer(path: Path) -> Answer:
    """Read what a program wrote.

    Raises:
        OSError: if it wrote nothing.
        UnreadableError: if that is no answer.
    """
    return build_from(Answer, read_json(path, LONGEST_ANSWER))
