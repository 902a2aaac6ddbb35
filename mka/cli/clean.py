"""`mka clean`: keep the work folder from growing for ever."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import find_work
from mka.cli.options import FILE
from mka.errors import DurationError
from mka.outside.sizes import format_size
from mka.terminal import Outcome, align

if TYPE_CHECKING:
    from mka.store.cleaning import Cleaning


def read_age(context: click.Context, option: click.Parameter, value: str) -> timedelta:
    """Read ``12h``, ``30d`` or ``2w``."""
    from mka.store.cleaning import read_duration

    try:
        return read_duration(value)
    except DurationError as error:
        raise click.BadParameter(f"{error}.") from None


@click.command(epilog=examples("mka clean --older-than 30d --dry-run", "mka clean --older-than 30d"))
@click.option("--work", type=FILE, metavar="DIR", help="Work folder.  [default: MKA_WORK, or data/work]")
@click.option(
    "--older-than", callback=read_age, required=True, metavar="AGE", help="Hours, days or weeks: 12h, 30d or 2w."
)
@click.option("--models", is_flag=True, help="Base models built longer ago than AGE go, too; the last run's stays.")
@click.option("--dry-run", is_flag=True, help="List what would go.")
@reports
def clean(work: Path | None, older_than: timedelta, models: bool, dry_run: bool) -> Outcome:
    """Remove from the work folder what was not used for AGE.

    Stage results not made or reused since, wheels downloaded longer ago, and what killed processes left: half-written
    results and lock files of any age, temporary folders that nobody wrote to for a day. All of it can be made again.

    The registry holds its own copy of each registered model: a stage result that is gone costs its computation when it
    is wanted again, never a registered version. What last_run.json points at stays, and so do the stores of MLflow
    and Prefect, the pages of data checks, and results that a process is working on. Take AGE longer than your longest
    run, since a run reads its early results again at its end.
    """
    from mka.store.cleaning import clean as clean_work

    place = work or find_work()
    return describe_cleaning(place, clean_work(place, older_than, models=models, dry_run=dry_run), dry_run)


def describe_cleaning(work: Path, found: "Cleaning", dry_run: bool) -> Outcome:
    """Say what went, or would go."""
    locks = [item for item in found.removed if item.kind == "stale lock"]
    rows: list[list[Any]] = [
        [item.kind, item.path, format_size(item.size), format_age(item.unused)]
        for item in found.removed
        if item.kind != "stale lock"
    ]
    if locks:
        rows.append([f"stale lock{'s' if len(locks) > 1 else ''}", f"{len(locks)} of them", format_size(0), ""])
    total = sum(item.size for item in found.removed)
    said = f"{format_size(total)} in {len(found.removed)} things {'would go' if dry_run else 'went'} from {work}"
    parts = [align(rows, ["what", "path", "size", "age"], "llrr")] if rows else []
    parts.append("\n".join([said, *found.notes, *(["dry run: nothing was removed"] if dry_run else [])]))
    document = {
        "work": str(work),
        "dry_run": dry_run,
        "bytes": total,
        "removed": [
            {"kind": item.kind, "path": str(item.path), "bytes": item.size, "unused_seconds": round(item.unused)}
            for item in found.removed
        ],
        "notes": found.notes,
    }
    return Outcome(document, "\n\n".join(parts))


def format_age(seconds: float) -> str:
    """Write seconds as days, or hours below two days."""
    return f"{seconds / 86400:,.0f} d" if seconds >= 2 * 86400 else f"{max(seconds, 0) / 3600:,.1f} h"
