"""The door behind scoring: every pair or layer, in range."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mka.errors import NumericsError
from mka.evidence.states import LayerScores
from mka.pipeline.job import Job
from mka.pipeline.stage import SCORES_FILE
from tasks.guards.columns import expect_complete, expect_finite
from tasks.guards.guard import import_great_expectations

if TYPE_CHECKING:
    import pandas as pd


def scores_suite(kind: str, layers: int, unit_diagonal: bool = True) -> list[Any]:
    """Expectations of `scores_table`.

    Args:
        kind: "pairwise-similarity", "block-distance" or "layer-importance".
        layers: number of layers L.
        unit_diagonal: whether a layer's similarity with itself is 1 under the method's definition.
    """
    gxe = import_great_expectations().expectations
    if kind == "layer-importance":
        return [
            gxe.ExpectTableRowCountToEqual(value=layers),
            expect_complete("value"),
            expect_finite("value"),
        ]
    diagonal = gxe.ExpectColumnValuesToBeBetween(
        column="diagonal_error", min_value=0, max_value=1e-9, description="A layer is fully similar to itself."
    )
    return [
        gxe.ExpectTableRowCountToEqual(value=layers * layers),
        expect_complete("value"),
        gxe.ExpectColumnValuesToBeBetween(column="value", min_value=0, max_value=1),
        gxe.ExpectColumnValuesToBeBetween(
            column="asymmetry", min_value=0, max_value=1e-9, description="The value of a and b is that of b and a."
        ),
        *([diagonal] if unit_diagonal and kind == "pairwise-similarity" else []),
    ]


def scores_table(values: np.ndarray, kind: str) -> "pd.DataFrame":
    """Lay layer scores out in long format.

    Args:
        values: (L, L) for "pairwise-similarity" and "block-distance", (L,) for "layer-importance".
        kind: as `mka.evidence.states.LayerScores.kind`.

    Returns:
        Pairs: columns layer_a, layer_b, value, asymmetry = |S_ab - S_ba|, diagonal_error = |S_aa - 1| on the diagonal
        of a similarity and null elsewhere. Importance: columns layer, value.

    Raises:
        NumericsError: if the shape is not what ``kind`` says.
    """
    import pandas as pd

    values = np.asarray(values, dtype=np.float64)
    if kind == "layer-importance" and values.ndim == 1:
        return pd.DataFrame({"layer": range(len(values)), "value": values})
    if kind in ("pairwise-similarity", "block-distance") and values.ndim == 2 and values.shape[0] == values.shape[1]:
        layer_a, layer_b = np.divmod(np.arange(values.size), len(values))  # (L * L,) each, row by row
        with np.errstate(invalid="ignore"):  # inf - inf; the value itself is refused by its own expectation
            asymmetry = np.abs(values - values.T)[layer_a, layer_b]
            alike = (layer_a == layer_b) & (kind == "pairwise-similarity")
            diagonal = np.where(alike, np.abs(values[layer_a, layer_b] - 1.0), np.nan)
        columns = {"layer_a": layer_a, "layer_b": layer_b, "value": values[layer_a, layer_b]}
        return pd.DataFrame({**columns, "asymmetry": asymmetry, "diagonal_error": diagonal})
    raise NumericsError(
        f"{kind} scores have shape {values.shape}; allowed: pairwise-similarity and "
        "block-distance (L, L), layer-importance (L,)"
    )


def behind(job: Job, folder: Path, facts: Mapping[str, Any]) -> tuple[str, Any, list[Any]] | None:
    """What scoring left; nothing where a method does not score."""
    if facts["kind"] is None:
        return None
    scores = LayerScores.load(folder / SCORES_FILE)
    return "scores", scores_table(scores.values, scores.kind), scores_suite(scores.kind, scores.layers)
