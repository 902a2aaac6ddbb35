"""`mka merge`: the model that a plan makes."""

from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.options import (
    FILE,
    alignment_options,
    alignment_values,
    build_section,
    combine,
    given,
    loading_options,
    model_argument,
    open_model,
    output_folder,
    quantize_options,
)
from mka.store.publishing import check_free
from mka.terminal import Outcome, quiet_libraries


@click.command(
    epilog=examples(
        "mka merge ./smollm2 --plan plan.json --quantize int8 --output ./smollm2-24",
        "mka merge ./smollm2 --plan plan.json --align --align-tokens 32768 --output ./smollm2-24",
    )
)
@model_argument
@click.option("--plan", "plan_file", type=FILE, required=True, metavar="FILE", help="What `mka plan` wrote.")
@combine(alignment_options, quantize_options, loading_options)
@output_folder
@reports
def merge(
    model: str,
    plan_file: Path,
    quantize: str | None,
    group_size: int | None,
    output: Path,
    dtype: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> Outcome:
    """Write the model that a plan makes of MODEL.

    It becomes a stock folder that transformers loads: written aside, loaded as a stranger would load it, and renamed
    into place only if that went well. With --align the layers from the first change on are refitted meanwhile; what
    is evaluated later is not known here, so keep its texts out of the table yourself.
    """
    from mka.alignment.table import fit_windows, open_alignment
    from mka.model.checkpoint import describe_checkpoint, open_checkpoint
    from mka.pipeline.pipeline import write_candidate
    from mka.plan.plan import MergePlan
    from mka.recipe import AlignmentSettings, QuantizeSettings
    from mka.report.alignment import summarise_alignment
    from mka.store.publishing import publish
    from mka.transforms import get_quantizer
    from mka.transforms.fold import load_folds
    from mka.transforms.merge import check_alignable, check_plan_fits

    check_free(output)
    settings = build_section(QuantizeSettings, given({"scheme": quantize, "group_size": group_size}))
    fitting = build_section(AlignmentSettings, {"rev": None} | alignment_values(**options))
    if not fitting.enabled and any(options.values()):
        raise click.UsageError("--align-tokens and --alignment-table go with --align.")
    made = MergePlan.load(plan_file)
    table = open_alignment(fitting.path, fitting, ()) if fitting.enabled else None
    base, source = open_model(model, dtype, trust_remote_code)
    check_plan_fits(made, base)
    check_alignable(made, fitting.enabled)
    folds = load_folds(made, plan_file)
    if settings.scheme != "off":
        get_quantizer(settings.scheme).check(base, settings)
    with quiet_libraries():
        table = fit_windows(table, base) if table else None
    with quiet_libraries(settings.scheme != "off"), publish(output) as partial:
        found = write_candidate(made, base, settings, partial, folds, table, source)
    facts = describe_checkpoint(open_checkpoint(output, verify=False)) | {"parameters": found["parameters"]}
    said = f"{facts['layers']} layers, {facts['parameters'] / 1e6:,.1f} M parameters, {facts['bytes'] / 1e6:,.1f} MB"
    fit = found.pop("alignment", None)
    lines = [said, *([summarise_alignment(fit)] if fit else []), str(output)]
    return Outcome(facts | {"output": str(output), "loaded": found, "alignment": fit}, "\n".join(lines))
