"""What each stage hands on, as tables that expectations can be held against (`tasks.suites`)."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mka.calibration import EXCERPT_CHARACTERS, text_digest
from mka.errors import CalibrationError, NumericsError, PlanError
from mka.measurements import EvalReport
from mka.plan import LayerRecipe, MergePlan

if TYPE_CHECKING:
    import pandas as pd

CHECKPOINT_COLUMNS = (
    "layers",
    "config_layers",
    "missing_keys",
    "unexpected_keys",
    "nonfinite_tensors",
    "parameters",
    "bytes",
    "generation_mismatches",
)
EVALUATION_COLUMNS = ("task", "id", "field", "text", "text_sha256")
REPORT_COLUMNS = ("model", "name", "metric", "value", "stderr", "n", "n_of_other")


def calibration_table(
    texts: Sequence[str | None],
    sources: Sequence[str | None],
    evaluation_digests: Collection[str] | Mapping[str, str],
    digest_fn: Callable[[str], str] = text_digest,
) -> "pd.DataFrame":
    """One row per calibration text, with the evaluation set it was found in, if any.

    Args:
        texts: S texts.
        sources: where each of them comes from, S names.
        evaluation_digests: digests of every text that evaluation uses; a mapping also says to which task each belongs.
        digest_fn: the digest those were made with.

    Returns:
        Columns row, source, text, characters, text_sha256, found_in_evaluation ("task: first 60 characters" or null).
    """
    table = heldout_table(texts, sources, digest_fn)
    tasks = evaluation_digests if isinstance(evaluation_digests, Mapping) else {}
    found = [
        f"{tasks.get(digest, 'evaluation')}: {' '.join(text.split())[:EXCERPT_CHARACTERS]}"
        if isinstance(text, str) and digest in evaluation_digests
        else None
        for text, digest in zip(table["text"], table["text_sha256"], strict=True)
    ]
    return table.assign(found_in_evaluation=_nullable(found))


def heldout_table(
    texts: Sequence[str | None], sources: Sequence[str | None], digest_fn: Callable[[str], str] = text_digest
) -> "pd.DataFrame":
    """One row per text: columns row, source, text, characters, text_sha256.

    Raises:
        CalibrationError: if there are not as many sources as texts.
    """
    import pandas as pd

    if len(texts) != len(sources):
        raise CalibrationError(f"{len(texts)} texts but {len(sources)} sources; give one source per text")
    return pd.DataFrame(
        {
            "row": range(len(texts)),
            "source": _nullable(sources),
            "text": _nullable(texts),
            "characters": [0 if text is None else len(text) for text in texts],
            "text_sha256": _nullable([None if text is None else digest_fn(text) for text in texts]),
        }
    )


def evaluation_table(rows: Iterable[Mapping[str, Any]]) -> "pd.DataFrame":
    """One row per text that evaluation uses: columns task, id, field, text, text_sha256.

    A column that no row has is left out, so that its expectations fail instead of passing on nothing.
    """
    import pandas as pd

    rows = list(rows)
    columns = [column for column in EVALUATION_COLUMNS if not rows or any(column in row for row in rows)]
    return pd.DataFrame({column: _nullable([row.get(column) for row in rows]) for column in columns})


def hidden_states_table(pooled: np.ndarray) -> "pd.DataFrame":
    """Summarise pooled hidden states, one row per layer.

    Args:
        pooled: (L+1, N, D), as `mka.states.HiddenStates.pooled`; row 0 is the embedding, row l+1 the output of layer l.

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


def scores_table(values: np.ndarray, kind: str) -> "pd.DataFrame":
    """Lay layer scores out in long format.

    Args:
        values: (L, L) for "pairwise-similarity" and "block-distance", (L,) for "layer-importance".
        kind: as `mka.states.LayerScores.kind`.

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


def _halves(layer: LayerRecipe) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (layer.attention, layer.mlp) if layer.verb == "take" else (layer.sources, layer.sources)


def checkpoint_table(facts: Mapping[str, Any]) -> "pd.DataFrame":
    """Lay the facts of one checkpoint out in one row.

    Args:
        facts: counts by the names in `CHECKPOINT_COLUMNS`; a collection of names counts as its length. A fact that is
            absent or None has no column, so that its expectations fail instead of passing on nothing.
    """
    import pandas as pd

    given = {name: facts[name] for name in CHECKPOINT_COLUMNS if facts.get(name) is not None}
    counts = {name: fact if isinstance(fact, int) else len(fact) for name, fact in given.items()}
    return pd.DataFrame([counts])


def evaluation_report_table(base: EvalReport, candidate: EvalReport) -> "pd.DataFrame":
    """One row per score of both reports.

    Returns:
        Columns model ("base", "candidate"), name, metric, value, stderr, n, n_of_other (n of the same name and metric
        in the other report; 0 if it is not there).
    """
    import pandas as pd

    reports = {"base": base, "candidate": candidate}
    scores = {model: [*report.text, *report.tasks] for model, report in reports.items()}
    counts = {model: {(score.name, score.metric): score.n for score in listed} for model, listed in scores.items()}
    rows = []
    for model, other in (("base", "candidate"), ("candidate", "base")):
        for score in scores[model]:
            n_of_other = counts[other].get((score.name, score.metric), 0)
            rows.append((model, score.name, score.metric, score.value, score.stderr, score.n, n_of_other))
    return pd.DataFrame(rows, columns=list(REPORT_COLUMNS))


def _nullable(values: Sequence[Any]) -> "pd.Series":
    # A column of None alone would otherwise become float, whose null is NaN.
    import pandas as pd

    return pd.Series(list(values), dtype=object)
