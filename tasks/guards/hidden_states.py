"""The door behind observation: finite states of every layer and text."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mka.errors import NumericsError
from mka.evidence.states import HiddenStates
from mka.pipeline.job import Job
from mka.pipeline.stage import STATES_FILE
from tasks.guards.columns import expect_complete, expect_finite
from tasks.guards.guard import import_great_expectations

if TYPE_CHECKING:
    import pandas as pd


def hidden_states_suite(layers: int, samples: int) -> list[Any]:
    """Expectations of `hidden_states_table` for L ``layers`` (plus the embedding) and N samples."""
    gxe = import_great_expectations().expectations
    return [
        gxe.ExpectTableRowCountToEqual(value=layers + 1, description="The embedding and every layer's output."),
        gxe.ExpectColumnValuesToBeInSet(column="samples", value_set=[samples]),
        gxe.ExpectColumnValuesToBeBetween(
            column="finite_fraction", min_value=1, max_value=1, description="No hidden state is NaN or infinite."
        ),
        *[expect_complete(column) for column in ("finite_fraction", "norm_mean", "norm_min", "norm_max")],
        gxe.ExpectColumnValuesToBeBetween(
            column="norm_min", min_value=0, strict_min=True, description="No text ends up at the origin."
        ),
        expect_finite("norm_max", 0, or_equal=False),
    ]


def hidden_states_table(pooled: np.ndarray) -> "pd.DataFrame":
    """Summarise pooled hidden states, one row per layer.

    Args:
        pooled: (L+1, N, D), as in `mka.evidence.states`; row 0 is the embedding, row l+1 the output of layer l.

    Returns:
        Columns layer, samples, finite_fraction, norm_mean, norm_min, norm_max. Norms are Euclidean, over the samples
        without NaN or infinity, in float64; null if there is none.

    Raises:
        NumericsError: if the array has not three axes.
    """
    import pandas as pd

    if pooled.ndim != 3:
        raise NumericsError(f"hidden states have shape {pooled.shape}, expected (L+1, N, D)")
    rows = []
    for layer, states in enumerate(pooled):  # (N, D), one layer in float64 at a time
        finite = np.isfinite(states)
        norms = np.linalg.norm(states[finite.all(axis=1)].astype(np.float64), axis=1)  # (samples without NaN,)
        mean, low, high = (norms.mean(), norms.min(), norms.max()) if norms.size else (np.nan,) * 3
        fraction = finite.mean() if finite.size else 0.0
        rows.append((layer, states.shape[0], float(fraction), float(mean), float(low), float(high)))
    columns = ["layer", "samples", "finite_fraction", "norm_mean", "norm_min", "norm_max"]
    return pd.DataFrame(rows, columns=columns)


def behind(job: Job, folder: Path, facts: Mapping[str, Any]) -> tuple[str, Any, list[Any]]:
    """What observation left."""
    states = HiddenStates.load(folder / STATES_FILE)
    return "hidden_states", hidden_states_table(states.pooled), hidden_states_suite(states.layers, len(states.tokens))
