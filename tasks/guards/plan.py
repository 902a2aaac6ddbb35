"""The door behind planning: the target's count, adjacent layers of one kind, weights of 1."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import PlanError
from mka.pipeline.job import Job
from mka.pipeline.stage import PLAN_FILE
from mka.plan.plan import MergedLayer, MergePlan
from tasks.guards.columns import expect_complete
from tasks.guards.guard import import_great_expectations

if TYPE_CHECKING:
    import pandas as pd


def plan_suite(layers_out: int) -> list[Any]:
    """Expectations of `plan_table`: the target's count, adjacent layers of one kind, weights of 1."""
    gxe = import_great_expectations().expectations
    from great_expectations.expectations.row_conditions import Column

    summed = Column("verb") == "combine"
    return [
        gxe.ExpectTableRowCountToEqual(value=layers_out, description="As many layers remain as the target says."),
        *[expect_complete(column) for column in ("skipped", "kinds", "halves")],
        gxe.ExpectColumnValuesToBeUnique(column="first"),
        gxe.ExpectColumnValuesToBeBetween(
            column="skipped", min_value=0, max_value=0, description="Only adjacent layers are merged."
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="kinds", min_value=1, max_value=1, description="Layers of different kinds are never merged."
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="halves", min_value=2, max_value=2, description="Attention and MLP both come from the group."
        ),
        gxe.ExpectColumnValuesToNotBeNull(column="weight_sum", row_condition=summed),
        gxe.ExpectColumnValuesToBeBetween(
            column="weight_sum", min_value=1 - 1e-6, max_value=1 + 1e-6, row_condition=summed
        ),
    ]


def plan_table(plan: MergePlan, layer_kinds: Sequence[str] | None = None) -> "pd.DataFrame":
    """One row per output layer of a plan.

    Args:
        plan: the plan.
        layer_kinds: kind of each source layer ("full_attention", "sliding_attention"), L names; None if the model
            has one kind only.

    Returns:
        Columns layer, verb, sources (text), first, last, skipped (source layers left out inside the group; 0:
        adjacent), kinds (number of different layer kinds among the attention layers it is made of), halves (of
        attention and MLP, how many come from the group; 2: both), weight_sum (null where nothing is summed).

    Raises:
        PlanError: if there is not one kind per source layer.
    """
    import pandas as pd

    kinds = ["layer"] * plan.layers_in if layer_kinds is None else list(layer_kinds)
    if len(kinds) != plan.layers_in:
        raise PlanError(f"{len(kinds)} layer kinds for a plan of {plan.layers_in} source layers; give one per layer")
    rows = [
        {
            "layer": index,
            "verb": layer.verb,
            "sources": "+".join(str(source) for source in layer.sources),
            "first": layer.sources[0],
            "last": layer.sources[-1],
            "skipped": layer.sources[-1] - layer.sources[0] + 1 - len(layer.sources),
            "kinds": len({kinds[source] for source in layer.attention or layer.sources}),
            "halves": sum(bool(half) and {*half} <= {*layer.sources} for half in _halves(layer)),
            "weight_sum": float(sum(layer.weights)) if layer.verb == "combine" else None,
        }
        for index, layer in enumerate(plan.layers)
    ]
    return pd.DataFrame(rows)


def _halves(layer: MergedLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (layer.attention, layer.mlp) if layer.verb == "take" else (layer.sources, layer.sources)


def behind(job: Job, folder: Path, facts: Mapping[str, Any]) -> tuple[str, Any, list[Any]]:
    """What planning left."""
    kinds = ["/".join(str(value) for value in kind) for kind in job.base.kinds]
    return "plan", plan_table(MergePlan.load(folder / PLAN_FILE), kinds), plan_suite(job.aim.layers_out)
