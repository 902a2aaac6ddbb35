"""What was lost: measuring a model, and judging a candidate by its base."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mka.console import Outcome, align, check_free, examples, reports, typed, write_file
from mka.errors import RecipeError
from mka.options import (
    FILE,
    build_section,
    combine,
    evaluation_options,
    evaluation_values,
    given,
    loading_options,
    open_model,
    recipe_option,
)
from mka.quiet import quiet_libraries

if TYPE_CHECKING:
    from mka.measurements import EvalReport


@click.command(epilog=examples("mka evaluate ./smollm2-24 --text heldout.jsonl --tasks hellaswag=40 --output new.json"))
@click.argument("model")
@combine(
    evaluation_options,
    click.option("--batch-size", type=int, metavar="N", help="Sequences per forward pass.  [default: 8]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Draws the items of a benchmark."),
    loading_options,
)
@click.option("--output", type=FILE, metavar="FILE", help="Keep the report, JSON; must not exist.")
@reports
def evaluate(
    model: str,
    text: Path | None,
    tasks: dict[str, int | None],
    tasks_folder: str | None,
    context: int | None,
    tokens: int | None,
    batch_size: int | None,
    seed: int,
    dtype: str | None,
    trust_remote_code: bool,
    output: Path | None,
) -> Outcome:
    """Measure MODEL from disk: perplexity and benchmarks.

    Also its speed and a sample of its text. Every figure comes with its n and, as ±, one standard error.
    """
    from mka.checkpoint import describe_checkpoint
    from mka.compress import measure_checkpoint
    from mka.job import check_evaluation
    from mka.recipe import EvaluationSettings
    from mka.report import result_table

    if output is not None:
        check_free(output)
    values = {"text": None} | evaluation_values(text, tasks, tasks_folder, context, tokens)
    settings = build_section(EvaluationSettings, values | given({"batch_size": batch_size}))
    if settings.text is None and not settings.tasks:
        raise RecipeError("nothing to evaluate on; give --text FILE, --tasks TASK=ITEMS, or both")
    heldout = check_evaluation(settings)
    checkpoint, source = open_model(model, dtype, trust_remote_code)
    with quiet_libraries(checkpoint.is_quantized):
        report = measure_checkpoint(
            checkpoint, describe_checkpoint(checkpoint), settings, source, heldout, seed=seed, command=typed()
        )
    if output is not None:
        write_file(output, lambda path: path.write_text(report.to_json(), encoding="utf-8"))
    rows = [[row["quantity"], row["candidate"]] for row in result_table(None, report)]
    document = json.loads(report.to_json()) | {"output": str(output) if output else None}
    return Outcome(document, align(rows, ["quantity", "value"], "lr") + (f"\n\n{output}" if output else ""))


@click.command(epilog=examples("mka report --plan plan.json --base base.json --candidate new.json --output report"))
@click.option("--plan", "plan_file", type=FILE, required=True, metavar="FILE", help="What `mka plan` wrote.")
@click.option("--base", type=FILE, required=True, metavar="FILE", help="Report of `mka evaluate` on the base.")
@click.option("--candidate", type=FILE, required=True, metavar="FILE", help="The same on the candidate.")
@click.option("--scores", type=FILE, metavar="FILE", help="What `mka score` wrote, for the picture.")
@recipe_option
@click.option("--output", type=FILE, required=True, metavar="DIR", help="Folder to write; must not exist.")
@reports
def report(
    plan_file: Path, base: Path, candidate: Path, scores: Path | None, recipe_file: Path | None, output: Path
) -> Outcome:
    """Decide the gate, write report.html and a model card.

    The gate compares the lower 95 % bound of recovery with its threshold: pass, fail (exit code 1) or undecided.
    Thresholds are those of the recipe, or the defaults.
    """
    from mka.compress import refuse_failed
    from mka.gate import decide, recover_tasks
    from mka.plan import MergePlan
    from mka.recipe import GateSettings, load_recipe
    from mka.report import ReportData, result_table, write_card, write_report
    from mka.states import LayerScores
    from mka.writing import publish

    check_free(output)
    recipe = load_recipe(recipe_file) if recipe_file else None
    before, after = read_report(base), read_report(candidate)
    thresholds, seed = (recipe.gate, recipe.seed) if recipe else (GateSettings(), 0)
    decision = decide(before, after, thresholds, seed=seed)
    data = ReportData(
        recipe=recipe.model_dump(mode="json") if recipe else {},
        plan=MergePlan.load(plan_file),
        scores=LayerScores.load(scores) if scores else None,
        base=before,
        candidate=after,
        gate=decision.to_dict(),
        recoveries=recover_tasks(before, after, seed=decision.seed),
        provenance={"base_model": before.checkpoint.get("path"), "command": typed()},
    )
    with publish(output) as partial:
        write_report(data, partial)
        write_card(data, partial)
    rows = result_table(before, after)
    document = {"verdict": decision.verdict, "gate": decision.to_dict(), "results": rows, "output": str(output)}
    text = "\n".join([show_results(rows), "", *decision.describe(), "", str(output / "report.html")])
    return Outcome(document, text, refuse_failed(decision, output / "report.html"))


def read_report(path: Path) -> "EvalReport":
    """Read an evaluation report.

    Raises:
        RecipeError: if the file is none.
    """
    from mka.measurements import EvalReport

    try:
        return EvalReport.load(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} is not a report of mka evaluate ({type(error).__name__}: {error})") from None


def show_results(rows: Sequence[dict[str, str]]) -> str:
    """Lay out base and candidate side by side."""
    return align([list(row.values()) for row in rows], ["quantity", "base", "candidate", "candidate / base"], "lrrr")
