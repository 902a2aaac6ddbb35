"""Recipes read from files, and held against the method and the transforms they name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mka.errors import RecipeError
from mka.evaluation.rules import check_rules
from mka.methods import check_alignment, resolve_method
from mka.outside.reading import quote
from mka.recipe import Recipe
from mka.sections import explain_validation, read_yaml
from mka.transforms import resolve_transforms

# What a recipe that names no method also has, unless it says otherwise: of what was compared, it leaves the best model
# (docs/benchmarks-healing.md).
REPAIRED: Mapping[str, Mapping[str, Any]] = {"alignment": {"enabled": True}, "heal": {"mode": "distil"}}


def repair_default(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe in which a default method's plan is refitted and healed, where nothing is said of that."""
    method = raw.get("method", {})
    if not isinstance(method, dict) or "name" in method:
        return raw
    given = {name: raw.get(name, {}) for name in REPAIRED}
    return raw | {name: {**REPAIRED[name], **said} for name, said in given.items() if isinstance(said, dict)}


def validate_recipe(raw: Any, where: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe.

    Args:
        raw: what a YAML reader returned; see `repair_default`.
        where: how messages name its origin.

    Raises:
        RecipeError: on an unknown key, an unknown method, transform or setting, or an impossible value.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, got {type(raw).__name__}")
    try:
        recipe = Recipe.model_validate(repair_default(raw))
    except ValidationError as error:
        raise RecipeError(explain_validation(error, Recipe, where)) from None
    resolve_transforms(recipe.transforms, where)
    check_rules(recipe.gate, recipe.evaluation, where, [asked.engine for asked in recipe.engines])
    check_alignment(resolve_method(recipe.method, where), recipe.alignment.enabled, where)
    return recipe


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe.

    Args:
        path: the file.
        overrides: dotted keys and the values that replace the file's, e.g. ``{"target.layers": 26}``.

    Raises:
        RecipeError: if the file cannot be read or its content is refused.
    """
    if not isinstance(overrides, Mapping | None):
        raise RecipeError(f"overrides must map dotted keys to values, e.g. target.layers: 26; got {quote(overrides)}")
    raw = read_yaml(path, "recipes live in recipes/")
    if not isinstance(raw, dict):
        return validate_recipe(raw, str(path))
    for dotted, value in (overrides or {}).items():
        *parents, key = str(dotted).split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                validate_recipe(raw, str(path))
                raise RecipeError(f"{path}: override {dotted!r}: {parent!r} is not a section of the recipe")
        node[key] = value
    return validate_recipe(raw, str(path))
