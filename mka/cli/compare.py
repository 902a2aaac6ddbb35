"""`mka compare`: two models or reports side by side."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import find_work
from mka.cli.options import FILE, Command, recipe_options
from mka.terminal import Outcome, align

if TYPE_CHECKING:
    from mka.bench.compare import Side


@click.command(
    cls=Command,
    epilog=examples(
        "mka compare ./smollm2 ./smollm2-24",
        "mka compare base.json new.json",
        "mka compare ./smollm2-24 ./smollm2-20 --report other.json",
    ),
)
@click.argument("a")
@click.argument("b")
@click.option(
    "--report",
    "given",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="What `mka evaluate` wrote of A or B, if it is not in their evidence; may be repeated.",
)
@recipe_options("seed", help={"seed": "Draws the resamples.  [default: 0]"})
@reports
def compare(a: str, b: str, given: tuple[Path, ...], asked: dict[str, Any]) -> Outcome:
    """Hold model B against model A: layers, bytes, config, and what was measured of both.

    A and B are models as other commands take them, or reports that `mka evaluate` wrote. Of models config and headers
    are read; their scores are those in the evidence of either (`mka compress` leaves them in DIR/evidence) or of
    --report, told apart by the digest of the model they were measured on. Scores of the same windows or items are
    compared pairwise: a ratio B / A, and its 95 % interval by a paired bootstrap. Where that includes 1, it cannot be
    told which is better. Speeds and sizes have no interval.
    """
    from mka.bench.compare import compare_scores, list_differences, open_sides, show_setting, summarise
    from mka.report.table import format_value, result_table

    sides = open_sides((a, b), given, find_work())
    measured = [side.report for side in sides]
    rows = []
    if measured[0] is not None and measured[1] is not None:
        rows = compare_scores(measured[0], measured[1], seed=asked.get("seed", 0))
    # Facts and speeds are laid out as in every report; scores get an interval and a word beside.
    facts = result_table(*(_keep_facts(side) for side in sides))
    table = [[row["quantity"], row["base"], row["candidate"], row["ratio"], "", ""] for row in facts]
    for row in rows:
        unit = "" if row["n"] is None else f" (n = {row['n']:,})"
        figures = [format_value(row[side].value, row[side].stderr) for side in "ab"]
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.append([row["label"] + unit, *figures, ratio, _show_interval(row), _show_verdict(row)])
    configs = [side.config for side in sides]
    differing = list_differences(configs[0], configs[1]) if configs[0] is not None and configs[1] is not None else []
    said = summarise(sides, rows)
    document = {
        **{letter: _describe(side) for letter, side in zip("ab", sides)},
        "config": differing,
        "scores": [{**row, "a": _describe_score(row["a"]), "b": _describe_score(row["b"])} for row in rows],
        "summary": said,
    }
    heads = [
        f"{letter}  {side.name}{f', measured in {side.source}' if side.source else ''}"
        for letter, side in zip("AB", sides)
    ]
    parts = ["\n".join(heads), align(table, ["quantity", "A", "B", "B / A", "95 % interval", "better"], "lrrrr")]
    if differing:
        told = [[entry["key"], show_setting(entry["a"]), show_setting(entry["b"])] for entry in differing]
        parts.append(align(told, ["config.json", "A", "B"], "lll"))
    return Outcome(document, "\n\n".join([*parts, said]))


def _keep_facts(side: "Side") -> Any:
    from mka.evaluation.scores import EvalReport

    report = side.report or EvalReport({}, (), {}, {}, {})
    return replace(report, checkpoint=side.facts, scores=())


def _show_interval(row: Mapping[str, Any]) -> str:
    if row["verdict"] is None:
        return "–"
    lower, upper = ("open" if row[key] is None else f"{row[key]:.3f}" for key in ("lower", "upper"))
    return f"{lower} to {upper}"


def _show_verdict(row: Mapping[str, Any]) -> str:
    words = {"better": "B", "worse": "A", "equal": "equal", "undecided": "cannot be told"}
    return words.get(row["verdict"], "not comparable")


def _describe(side: "Side") -> dict[str, Any]:
    return {"name": side.name, "facts": dict(side.facts), "report": str(side.source) if side.source else None}


def _describe_score(score: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(score).items() if key in ("value", "stderr", "n")}
