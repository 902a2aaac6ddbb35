"""Where a candidate goes, in which form: one file each, behind one seam."""

import importlib
from collections.abc import Callable
from pathlib import Path

from mka.errors import RecipeError, nearest

# A row per form: its name in `mka export --format`, and the module that holds its EXPORT.
_EXPORTS = {
    "folder": "mka.export.folder",
}

Export = Callable[[Path, Path], None]


def export_names() -> list[str]:
    """Names of all forms."""
    return list(_EXPORTS)


def get_export(name: str) -> Export:
    """Return what writes a model folder in a form: called with the folder and an empty folder to fill.

    Raises:
        RecipeError: if there is no such form; the nearest name is suggested.
    """
    if name not in _EXPORTS:
        raise RecipeError(f"unknown format {name!r}{nearest(name, _EXPORTS)}; formats: {', '.join(_EXPORTS)}")
    return importlib.import_module(_EXPORTS[name]).EXPORT
