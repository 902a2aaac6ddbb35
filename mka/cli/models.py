"""The model that was typed, and the work folder it is fetched to."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.cli.options import pick

if TYPE_CHECKING:
    from mka.model.checkpoint import Checkpoint
    from mka.recipe import ModelSource


def find_work() -> Path:
    """Return the work folder: ``MKA_WORK``, or ``data/work`` here."""
    return Path(os.environ.get("MKA_WORK") or "data/work")


def name_source(model: str, asked: Mapping[str, Any]) -> "ModelSource":
    """Read MODEL and how to load it.

    Args:
        model: what was typed for it.
        asked: what was typed of the recipe's keys.

    Raises:
        CheckpointError: if it names no model.
    """
    from mka.sources.fetch import parse_model

    return parse_model(model).model_copy(update=pick(asked, "model"))


def open_model(model: str, asked: Mapping[str, Any]) -> tuple["Checkpoint", "ModelSource"]:
    """Fetch and open MODEL; arguments are those of `name_source`.

    Raises:
        CheckpointError: if it cannot be had, is damaged, inconsistent or unsupported.
    """
    from mka.pipeline.job import fetch_base

    source = name_source(model, asked)
    return fetch_base(source, find_work())[0], source
