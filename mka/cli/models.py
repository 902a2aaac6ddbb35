"""The model that was typed, and the work folder it is fetched to."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mka.cli.options import pick
from mka.outside.project import find_work

if TYPE_CHECKING:
    from mka.model.checkpoint import Checkpoint
    from mka.recipe import AlignmentFit, CalibrationTexts, HealFit, ModelSource


Table = TypeVar("Table")
Texts = TypeVar("Texts", "CalibrationTexts", "AlignmentFit", "HealFit")


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


def open_with_table(
    model: str,
    asked: Mapping[str, Any],
    read: Callable[[Path], Table],
    *,
    calibration: "CalibrationTexts | None" = None,
    alignment: "AlignmentFit | None" = None,
    heal: "HealFit | None" = None,
    seed: int = 0,
) -> tuple["Checkpoint", "ModelSource", Table | None]:
    """Fetch and open MODEL, and read the table that one section names, if one is given.

    A table is read first: for one that was named and is not there nothing is fetched. What the base writes itself,
    where it is asked to or no table is at hand, is read last.

    Args:
        model: see `name_source`.
        asked: see `name_source`.
        read: reads the table from a file.
        calibration: the section, or
        alignment: the section, or
        heal: the section.
        seed: of what the base writes itself.

    Raises:
        MkaError: if the model cannot be had or the table cannot be read.
    """
    from mka.pipeline.written import as_own_text, want_text, write_table
    from mka.store.publishing import make_work
    from mka.terminal import quiet_libraries

    calibration, alignment = calibration and stand_in(calibration), alignment and stand_in(alignment)
    heal = heal and stand_in(heal)
    section = calibration or alignment or heal
    wanted = want_text(calibration, alignment, heal, seed=seed)
    table = read(section.path) if section is not None and wanted is None else None
    checkpoint, source = open_model(model, asked)
    if wanted is not None:
        make_work(find_work())
        with quiet_libraries():
            table = read(as_own_text(write_table(checkpoint, source, wanted, find_work() / "stages")).file)
    return checkpoint, source, table


def stand_in(section: Texts, said: bool = True) -> Texts:
    """Let the base write the texts that a section reads from the project's own table, where that is not there.

    A table that somebody named is left alone: that it is missing is a mistake then.

    Args:
        section: of the recipe.
        said: tell who is typing.
    """
    from mka.recipe import BASE_TEXT

    if "path" in section.model_fields_set or section.path.is_file():
        return section
    if said:
        click.echo(f"note: no {section.path}: the base writes its own text for it", err=True)
    return section.model_copy(update={"path": BASE_TEXT})
