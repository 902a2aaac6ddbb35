"""Which table stands at which door: in front of a stage, or behind it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mka.pipeline.job import Job
from mka.pipeline.stage import Found
from tasks.guards import checkpoint, engines, evaluation, hidden_states, plan, scores

# Name of a suite, a table, and what must hold of it; None if there is nothing to check.
Door = tuple[str, Any, list[Any]] | None

IN_FRONT: dict[str, Callable[[Job, Found], Door]] = {
    "gate": evaluation.in_front,
}
BEHIND: dict[str, Callable[[Job, Path, Mapping[str, Any]], Door]] = {
    "observe": hidden_states.behind,
    "score": scores.behind,
    "plan": plan.behind,
    "merge": checkpoint.behind,
    "heal": checkpoint.behind,
    "transform": checkpoint.behind,
    "quantize": checkpoint.behind,
    "control": checkpoint.behind_control,
    "serve": engines.behind,
}
