"""`mka evaluate`: a model measured from disk."""

import json
from pathlib import Path

import click

from mka.cli.console import examples, reports, typed
from mka.cli.options import (
    FILE,
    build_section,
    combine,
    evaluation_options,
    evaluation_values,
    given,
    loading_options,
    open_model,
)
from mka.errors import RecipeError
from mka.store.publishing import check_free, write_file
from mka.terminal import Outcome, align, quiet_libraries


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
    from mka.model.checkpoint import describe_checkpoint
    from mka.pipeline.evaluate import measure_checkpoint
    from mka.pipeline.inputs import read_measured
    from mka.recipe import EvaluationSettings
    from mka.report.table import result_table

    if output is not None:
        check_free(output)
    values = {"text": None} | evaluation_values(text, tasks, tasks_folder, context, tokens)
    settings = build_section(EvaluationSettings, values | given({"batch_size": batch_size}))
    if settings.text is None and not settings.tasks:
        raise RecipeError("nothing to evaluate on; give --text FILE, --tasks TASK=ITEMS, or both")
    inputs = read_measured(settings, settings.text, settings.tasks_folder)
    checkpoint, source = open_model(model, dtype, trust_remote_code)
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
