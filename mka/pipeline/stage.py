"""One stage of the pipeline."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mka.evaluation.gate import GateDecision
from mka.evaluation.scores import EvalReport
from mka.plan.plan import MergePlan


@dataclass(frozen=True)
class Compression:
    """What came of one compression.

    Attributes:
        output: the published folder.
        plan: what was merged.
        base: measurements of the base, or its facts alone.
        candidate: the same of the candidate.
        decision: the gate's; None if nothing was measured.
        seconds: stage -> seconds.
        alignment: facts of the refit; None if there was none.
    """

    output: Path
    plan: MergePlan
    base: EvalReport
    candidate: EvalReport
    decision: GateDecision | None
    seconds: Mapping[str, float]
    alignment: Mapping[str, Any] | None = None


@dataclass
class Clock:
    """Seconds per stage; says each as it ends."""

    say: Callable[[str], Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)
        self.say(f"{name:<22} {self.seconds[name]:7.1f} s")
