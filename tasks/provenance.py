"""Where a run's parts come from: commits of the code and of its tables."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from mka.recipe import BASE_TEXT, Recipe
from tasks.versioned import Version


def read_code_commit(root: Path) -> str:
    """Return the commit of the checkout, marked "+changes" if files differ from it; "unknown" outside Git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_provenance(recipe: Recipe, versions: Mapping[str, Version], root: Path) -> dict[str, str]:
    """Return the commits that tables of texts were read at, or "working copy", and the code's.

    A table that the base wrote has no commit: the base's digest, the seed and the code decide it.
    """
    tables = {"calibration_rev": recipe.calibration.path}
    if recipe.alignment.enabled:
        tables["alignment_rev"] = recipe.alignment.path
    if recipe.heal.mode != "off":
        tables["healing_rev"] = recipe.heal.path
    found = {
        key: "written by the base" if path == BASE_TEXT else versions[str(path)].rev or "working copy"
        for key, path in tables.items()
    }
    return found | {"code_commit": read_code_commit(root)}
