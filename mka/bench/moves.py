"""A recipe's moves side by side, as a comparison: fewer bits, fewer layers, and both in the same bytes."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mka.bench.recipe import BenchRecipe, validate_bench
from mka.errors import RecipeError
from mka.kernels import MIXED, list_mixed
from mka.model.checkpoint import Checkpoint
from mka.pipeline.target import foresee_rounded, least_bytes, refuse_bytes, resolve_aim
from mka.recipe import BASE_TEXT, AlignmentFit, CalibrationTexts, HealFit, Measurement, QuantizeSettings, Recipe
from mka.texts.rows import read_rows

# Numbers of bits that all layers are compared at, where they run.
ALIKE = ("int8", "int4", "int3")
# Of bits, between two of which budgets lie that nobody named.
STEPS = ("int4", "int3", "int2")


def lay_out_moves(
    recipe: Recipe, base: Checkpoint, budgets: Sequence[float], depths: Sequence[int], output: Path
) -> BenchRecipe:
    """Return the comparison of what a recipe allows: bits alone, depth alone, and both.

    Method, refit, healing, texts and rounding are the recipe's; where it rounds to the nearest, `gptaq` is taken, which
    mixed bits need.

    Args:
        recipe: what is asked for.
        base: its opened base.
        budgets: bytes of all tensors that bits are mixed for; none: two that lie between 4 and 2 bits for all layers.
        depths: layers that remain; none: those of the recipe's target, or nine tenths of the base's.
        output: folder of the page and its pictures.

    Raises:
        RecipeError: if there is nothing to measure on, the recipe transforms weights, a depth is none, or a budget is
            less than the fewest bits take.
    """
    if recipe.transforms:
        raise RecipeError("transforms are no move of a frontier; take them out of the recipe")
    if recipe.evaluation.text is None:
        raise RecipeError("evaluation.text: quality is measured on it; name a table or a .txt file")
    rounding = choose_rounding(recipe.quantize)
    depths = sorted(set(depths) or {choose_depth(recipe, base)}, reverse=True)
    if strange := [layers for layers in depths if not 1 <= layers < base.layers]:
        raise RecipeError(f"{strange[0]} layers: the model has {base.layers}; depths are 1 to {base.layers - 1}")
    budgets = budgets or choose_budgets(base, rounding)
    there = [name for name in ALIKE if name in list_mixed(rounding["serve_on"])]
    alike = [rounding | {"scheme": name} for name in there]
    mixed = [rounding | {"scheme": MIXED, "bytes": nbytes} for nbytes in budgets]
    for one in mixed:
        refuse_bytes(base, QuantizeSettings(**one), depths[0])
    held = [one for one in mixed if one["bytes"] >= least_bytes(base, QuantizeSettings(**one), base.layers)]
    entry: dict[str, Any] = {"name": recipe.method.name, "settings": dict(recipe.method.settings)}
    repaired = {
        "alignment": [recipe.alignment.enabled],
        "heal": [recipe.heal.tokens if recipe.heal.mode == "distil" else 0],
    }
    raw = {
        "name": f"{recipe.name}-frontier",
        "model": recipe.model.model_dump(mode="json", exclude_defaults=True),
        "calibration": _pick(recipe.calibration, CalibrationTexts),
        "alignment": _pick(recipe.alignment, AlignmentFit),
        "heal": _pick(recipe.heal, HealFit),
        "protect_first": recipe.target.protect_first,
        "protect_last": recipe.target.protect_last,
        "targets": [base.layers, *depths],
        "methods": [
            # Which method keeps all layers makes no difference; this one looks at nothing for it.
            {"name": "uidl", "label": "bits alone", "targets": [base.layers], "quantize": alike + held},
            entry | repaired | {"label": "depth alone", "targets": depths},
            entry | repaired | {"label": "depth and bits", "ours": True, "targets": depths, "quantize": mixed},
        ],
        "texts": list_texts(recipe),
        "evaluation": _pick(recipe.evaluation, Measurement) | {"tasks": {}, "generation": 0},
        "output": str(output / "frontier.md"),
        "picture": str(output / "frontier.png"),
        "seed": recipe.seed,
    }
    return validate_bench(raw)


def choose_rounding(settings: QuantizeSettings) -> dict[str, Any]:
    """Return what all roundings have in common."""
    kept = settings.model_dump(include={"tokens", "group_size", "embeddings", "serve_on"})
    return kept | {"rounding": settings.rounding if settings.rounding != "nearest" else "gptaq"}


def choose_depth(recipe: Recipe, base: Checkpoint) -> int:
    """Return the layers of a recipe's target; where they are all of them, nine tenths."""
    found = resolve_aim(recipe.target, base, recipe.quantize).layers_out
    return found if found < base.layers else max(1, round(0.9 * base.layers))


def choose_budgets(base: Checkpoint, rounding: dict[str, Any]) -> list[float]:
    """Return the bytes half way between all layers in 4 and in 3 bits, and in 3 and in 2, as far as those run."""
    names = [name for name in STEPS if name in list_mixed(rounding["serve_on"])]
    sizes = [foresee_rounded(base, QuantizeSettings(**rounding, scheme=name), base.layers) for name in names]
    return [float(round((one + other) / 2)) for one, other in pairwise(sizes)]


def list_texts(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the held-out texts of a recipe, a source each, and whether calibration has texts of it."""
    path = recipe.evaluation.text
    assert path is not None
    if path.suffix == ".txt":
        return [{"name": path.stem, "path": str(path), "seen": False}]
    looked_at = recipe.calibration.path
    there = looked_at != BASE_TEXT and looked_at.is_file()
    seen = {row["source"] for row in read_rows(looked_at)} if there else set()
    sources = dict.fromkeys(row["source"] for row in read_rows(path))
    return [{"name": one, "path": str(path), "source": one, "seen": one in seen} for one in sources]


def _pick(section: Any, kind: type[Any]) -> dict[str, Any]:
    """Return the values of a section that a smaller section of the comparison has."""
    return dict(section.model_dump(mode="json", include=set(kind.model_fields)))
