"""Where a model can run, and what its speed was measured on, by the table of engines."""

from collections.abc import Mapping
from typing import Any

from mka.kernels import EMBEDDINGS, ENGINES, MIXED, Engine, find_row, list_mixed


def list_engines(recipe: Mapping[str, Any]) -> list[str]:
    """Say of every engine whether it loads what a recipe makes, and how or why not."""
    return [_tell(engine, recipe) for engine in ENGINES]


def tell_speed(recipe: Mapping[str, Any]) -> str | None:
    """Say what speeds of a rounded model are worth: they are stock loading's own; None where nothing is rounded."""
    schemes, _ = _read(recipe)
    if schemes == ["off"]:
        return None
    scheme = recipe["quantize"]["scheme"]
    return f"Speeds are of stock loading, where {scheme} is {find_row(None, schemes[0]).how}; an engine's are others."


def _tell(engine: Engine, recipe: Mapping[str, Any]) -> str:
    schemes, embeddings = _read(recipe)
    rows = [find_row(engine.serve_on, asked) for asked in (*schemes, *([EMBEDDINGS] if embeddings else []))]
    if missing := [row for row in rows if not row.loads]:
        return f"{engine.label}: no, it {missing[0].how}"
    seen = "" if all(row.ran for row in rows) else " (read, not run)"
    return f"{engine.label}: yes{seen}; {rows[0].how}"


def _read(recipe: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The schemes that layers may have, and whether embedding and head are rounded: recipes of before do not say so."""
    asked = recipe.get("quantize") or {}
    scheme = asked.get("scheme", "off")
    schemes = list_mixed(asked.get("serve_on")) if scheme == MIXED else [scheme]
    return schemes, asked.get("embeddings", "off") != "off"
