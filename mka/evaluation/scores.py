"""What was measured of one model: scores with their n, error bar and per-item values, and the conditions."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from mka.errors import ReportError

FORMAT = "mka-evaluation/1"


@dataclass(frozen=True)
class Score:
    """One measured quantity.

    Attributes:
        name: what it was measured on: an lm-eval task ("hellaswag") or a text source ("boolq").
        metric: "perplexity", or the task's own metric ("acc_norm", "acc").
        value: the figure.
        stderr: its standard error, in the unit of ``value``.
        n: number of independent items behind it: task items, or text windows.
        higher_is_better: direction.
        items: per-item values, aligned between base and candidate. Tasks: 0 or 1 per item. Perplexity: pairs
            ``(sum of negative log-likelihood in nats, predicted tokens)`` per window.
        extra: further figures of the same measurement (bits_per_byte, tokens, bytes, task version).
    """

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
        text: one perplexity `Score` per held-out source.
        tasks: one `Score` per task.
        speed: "prefill_tokens_per_second" and "decode_tokens_per_second".
        generations: prompt -> greedy continuation.
        conditions: dtype, device, threads, context, batch size, shots, limits, library versions, command.
    """

    checkpoint: Mapping[str, Any]
    text: tuple[Score, ...]
    tasks: tuple[Score, ...]
    speed: Mapping[str, float]
    generations: Mapping[str, str]
    conditions: Mapping[str, Any]

    def to_json(self) -> str:
        """Serialise in the documented format (docs/formats.md)."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report file."""
        body = json.loads(Path(path).read_text(encoding="utf-8"))
        for part in ("text", "tasks"):
            body[part] = tuple(
                Score(**{**score, "items": tuple(tuple(i) if isinstance(i, list) else i for i in score["items"])})
                for score in body[part]
            )
        body.pop("format")
        return cls(**body)


def read_report(path: Path) -> "EvalReport":
    """Read an evaluation report.

    Raises:
        ReportError: if the file is none.
    """
    try:
        return EvalReport.load(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path} is not a report of mka evaluate ({type(error).__name__}: {error})") from None
