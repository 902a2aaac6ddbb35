"""`mka merge`: the model that a plan makes."""

import shutil
from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import open_with_table
from mka.cli.options import (
    FILE,
    Command,
    build_section,
    device_option,
    model_argument,
    output_folder,
    pick,
    recipe_options,
    require_align,
)
from mka.kernels import MIXED
from mka.store.publishing import check_free
from mka.terminal import Outcome, quiet_libraries

# What looks at texts, which this command does not read.
CALIBRATED = ("quantize.rounding", "quantize.tokens", "quantize.bits_per_weight")


@click.command(
    cls=Command,
    epilog=examples(
        "mka merge ./smollm2 --plan plan.json --quantize int8 --output ./smollm2-24",
        "mka merge ./smollm2 --plan plan.json --align --align-tokens 32768 --output ./smollm2-24",
    ),
)
@model_argument
@click.option("--plan", "plan_file", type=FILE, required=True, metavar="FILE", help="What `mka plan` wrote.")
@recipe_options("alignment.enabled", "alignment", "quantize", "model", leave_out=CALIBRATED)
@output_folder
@device_option
@reports
def merge(model: str, plan_file: Path, output: Path, asked: dict[str, Any]) -> Outcome:
    """Write the model that a plan makes of MODEL.

    It becomes a stock folder that transformers loads: written aside, loaded as a stranger would load it, and renamed
    into place only if that went well. With --align the layers from the first change on are refitted meanwhile; what
    is evaluated later is not known here, so keep its texts out of the table yourself.
    """
    from mka.alignment.table import fit_windows, open_alignment
    from mka.export.folder import export_folder
    from mka.model.checkpoint import describe_checkpoint, open_checkpoint
    from mka.pipeline.merge import write_merged
    from mka.pipeline.quantize import check_quantizer, write_quantized
    from mka.plan.plan import MergePlan
    from mka.recipe import AlignmentSettings, QuantizeSettings
    from mka.report.alignment import summarise_alignment
    from mka.store.publishing import publish
    from mka.transforms.fold import load_folds
    from mka.transforms.merge import check_alignable, check_plan_fits

    check_free(output)
    if asked.get("quantize.scheme") == MIXED:
        raise click.UsageError("--quantize mixed looks at texts, which this command does not read; mka compress does.")
    settings = build_section(QuantizeSettings, pick(asked, "quantize"))
    fitting = build_section(AlignmentSettings, {"rev": None} | pick(asked, "alignment"))
    require_align(fitting.enabled, asked)
    made = MergePlan.load(plan_file)
    base, source, table = open_with_table(
        model, asked, lambda file: open_alignment(file, fitting, ()), alignment=fitting if fitting.enabled else None
    )
    check_plan_fits(made, base)
    check_alignable(made, fitting.enabled)
    folds = load_folds(made, plan_file)
    if settings.scheme != "off":
        check_quantizer(base, settings)
    with quiet_libraries():
        table = fit_windows(table, base) if table else None
    with quiet_libraries(settings.scheme != "off"), publish(output) as partial:
        found = write_merged(made, base, partial / "merged", folds, table, source)
        fit, last = found.pop("alignment", None), partial / "merged"
        if settings.scheme != "off":
            last = partial / "quantized"
            found = write_quantized(open_checkpoint(partial / "merged", verify=False), settings, last)
        export_folder(last, partial)
        for folder in ("merged", "quantized"):
            shutil.rmtree(partial / folder, ignore_errors=True)
    facts = describe_checkpoint(open_checkpoint(output, verify=False)) | {"parameters": found["parameters"]}
    said = f"{facts['layers']} layers, {facts['parameters'] / 1e6:,.1f} M parameters, {facts['bytes'] / 1e6:,.1f} MB"
    lines = [said, *([summarise_alignment(fit)] if fit else []), str(output)]
    return Outcome(facts | {"output": str(output), "loaded": found, "alignment": fit}, "\n".join(lines))
