"""`mka evaluate`: a model measured from disk."""

import json
from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports, typed
from mka.cli.models import open_model
from mka.cli.options import FILE, Command, build_section, default_of, model_argument, pick, recipe_options
from mka.errors import RecipeError
from mka.store.publishing import check_free, write_file
from mka.terminal import Outcome, align, quiet_libraries


@click.command(
    cls=Command,
    epilog=examples("mka evaluate ./smollm2-24 --text heldout.jsonl --tasks hellaswag=40 --output new.json"),
)
@model_argument
@recipe_options("evaluation.text", "evaluation", "seed", "model")
@click.option("--output", type=FILE, metavar="FILE", help="Keep the report, JSON; must not exist.")
@reports
def evaluate(model: str, output: Path | None, asked: dict[str, Any]) -> Outcome:
    """Measure MODEL from disk: perplexity, benchmarks and generation.

    Also its speed and a sample of its text. Every figure comes with its n and, as ±, one standard error.
    """
    from mka.evaluation.catalog import open_catalog
    from mka.model.checkpoint import describe_checkpoint
    from mka.pipeline.evaluate import measure_checkpoint
    from mka.pipeline.inputs import read_measured
    from mka.recipe import EvaluationSettings
    from mka.report.table import result_table

    if output is not None:
        check_free(output)
    settings = build_section(EvaluationSettings, {"text": None} | pick(asked, "evaluation"))
    inputs = read_measured(settings, settings.text, open_catalog(settings))
    if not inputs.measures:
        raise RecipeError("nothing to evaluate on; give --text FILE, --tasks TASK=ITEMS, --generation N, or several")
    seed = asked.get("seed", default_of("seed"))
    checkpoint, source = open_model(model, asked)
    with quiet_libraries(checkpoint.is_quantized):
        report = measure_checkpoint(
            checkpoint,
            describe_checkpoint(checkpoint),
            settings,
            source,
            inputs,
            seed=seed,
            command=typed(),
            speed=True,
        )
    if output is not None:
        write_file(output, lambda path: path.write_text(report.to_json(), encoding="utf-8"))
    rows = [[row["quantity"], row["candidate"]] for row in result_table(None, report)]
    document = json.loads(report.to_json()) | {"output": str(output) if output else None}
    return Outcome(document, align(rows, ["quantity", "value"], "lr") + (f"\n\n{output}" if output else ""))
