"""Where things lie: the project whose tables are read, if there is one, and the work folder."""

import os
from pathlib import Path

WORK = Path("data/work")
_CHECKOUT = Path(__file__).resolve().parents[2]
_OTHERWISE = "name one of yours, `base` for text that the base writes itself, or null for an evaluation without it"


def find_root() -> Path:
    """Return where relative paths of recipes begin: the project's root, or the current folder where there is none.

    A project is what DVC takes for one: the current folder or the nearest above it with ``.dvc``. Outside of any it is
    the checkout this file lies in, if it is no installed copy: a worker of its environment runs what it holds.
    """
    here = Path.cwd()
    return next(filter(is_project, (here, *here.parents, _CHECKOUT)), here)


def find_work() -> Path:
    """Return the work folder: ``MKA_WORK``, or `WORK` below `find_root`."""
    return Path(os.environ.get("MKA_WORK") or find_root() / WORK)


def suggest_table(otherwise: str = _OTHERWISE) -> str:
    """Say how a table that is missing is had: in a checkout of this project, and ``otherwise``."""
    return "`make data` builds the project's own" if in_checkout() else otherwise


def in_checkout() -> bool:
    """Whether the current folder is in a checkout of this project, which has a Makefile and tables of its own."""
    root = find_root()
    return Path.cwd().is_relative_to(root) and (root / "mka" / "outside" / Path(__file__).name).is_file()


def is_project(folder: Path) -> bool:
    """Whether a folder is the root of what DVC takes for a project."""
    return (folder / ".dvc").is_dir()
