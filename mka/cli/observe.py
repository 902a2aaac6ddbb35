"""`mka observe`: the hidden states of a model on calibration texts."""

from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import open_with_table
from mka.cli.options import FILE, Command, build_section, device_option, model_argument, pick, recipe_options
from mka.store.publishing import check_free, write_file
from mka.terminal import Outcome, quiet_libraries


@click.command(
    cls=Command, epilog=examples("mka observe ./smollm2 --calibration texts.jsonl --output states.safetensors")
)
@model_argument
@recipe_options("calibration", "model")
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Hidden states, safetensors; must not exist.")
@device_option
@reports
def observe(model: str, output: Path, asked: dict[str, Any]) -> Outcome:
    """Run MODEL over calibration texts, keep hidden states.

    One forward pass gives one vector per layer and text. MODEL is a folder, a hub id org/name[@revision], or
    package:NAME==VERSION. The calibration file holds JSON lines with a `text` field, or paragraphs if its name ends in
    .txt; at least 50 texts, better 200.
    """
    from mka.pipeline.observe import observe_checkpoint
    from mka.recipe import CalibrationSettings
    from mka.texts.calibration import load_calibration

    check_free(output)
    settings = build_section(CalibrationSettings, {"rev": None} | pick(asked, "calibration"))
    checkpoint, source, texts = open_with_table(
        model, asked, lambda file: load_calibration(file, settings.samples), calibration=settings
    )
    assert texts is not None
    with quiet_libraries():
        states = observe_checkpoint(checkpoint, texts, settings, source)
    write_file(output, states.save)
    facts = {
        "output": str(output),
        "layers": states.layers,
        "texts": len(states.tokens),
        "tokens": int(states.tokens.sum()),
        "width": states.pooled.shape[2],
        "pooling": settings.pooling,
        "block_influence": states.block_influence.tolist(),
        "digest": states.digest,
    }
    said = f"{facts['layers']} layers observed on {facts['texts']} texts, {facts['tokens']:,} tokens"
    return Outcome(facts, f"{said}\n{output}: next, mka score {model} --states {output} --output scores.json")
