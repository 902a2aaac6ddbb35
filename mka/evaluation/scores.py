"""What was measured of one model: scores with their n, error bar and per-item values, and the conditions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from mka.outside.reading import STRICT, UnreadableError, build_from, quote, read_json

FORMAT, FORMER = "mka-evaluation/2", "mka-evaluation/1"


@dataclass(frozen=True)
class Score:
    """One measured quantity.

    Attributes:
        name: what it was measured on: an lm-eval task ("hellaswag") or a text source ("boolq").
        metric: a name in `mka.evaluation.metrics.METRICS`.
        value: the figure.
        stderr: its standard error, in the unit of ``value``.
        n: number of independent items behind it: task items, or text windows.
        higher_is_better: direction.
        items: per-item values, aligned between base and candidate. Tasks: 0 or 1 per item. Texts: pairs
            ``(sum over the window's tokens, predicted tokens)`` per window; of perplexity the sum of negative
            log-likelihoods in nats.
        extra: further figures of the same measurement (bits_per_byte, tokens, bytes, task version).
    """

    __pydantic_config__ = STRICT

    name: str
    metric: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool
    items: tuple[Any, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalReport:
    """Everything measured of one checkpoint, from disk.

    Attributes:
        checkpoint: facts: path, digest, model_type, layers, parameters, bytes, dtype.
        scores: everything that was asked for, in the order of the table of metrics; a name and a metric make one.
        speed: "prefill_tokens_per_second" and "decode_tokens_per_second".
        generations: prompt -> greedy continuation.
        conditions: dtype, device, threads, context, batch size, shots, limits, library versions, command.
    """

    __pydantic_config__ = STRICT

    checkpoint: Mapping[str, Any]
    scores: tuple[Score, ...]
    speed: Mapping[str, float]
    generations: Mapping[str, str]
    conditions: Mapping[str, Any]

    def to_json(self) -> str:
        """Serialise in the documented format (docs/formats.md)."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report file, of this format or the former, which kept texts and tasks apart.

        Raises:
            ValueError: if it is of another, or holds something that is none.
        """
        body = read_json(path)
        if (given := body.pop("format")) not in (FORMAT, FORMER):
            raise UnreadableError(f"format {quote(given)}, expected {FORMAT!r}")
        if given == FORMER:
            body["scores"] = [*body.pop("text"), *body.pop("tasks")]
        report = build_from(cls, body)
        return replace(report, scores=tuple(replace(score, items=_tuples(score.items)) for score in report.scores))


def read_score(body: Mapping[str, Any]) -> Score:
    """Read what `asdict` wrote of a score."""
    return Score(**{**body, "items": _tuples(body["items"])})


def _tuples(items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(item) if isinstance(item, list) else item for item in items)
