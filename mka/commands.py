"""The stages as commands, one each: what one writes, the next reads."""

import json
from pathlib import Path
from typing import Any

import click

from mka.console import Outcome, align, check_free, examples, reports, write_file
from mka.errors import PlanError, RecipeError
from mka.options import (
    CALIBRATION,
    FILE,
    alignment_options,
    alignment_values,
    build_section,
    combine,
    given,
    loading_options,
    observation_options,
    open_model,
    quantize_options,
    set_option,
    target_options,
)
from mka.quiet import quiet_libraries

model_argument = click.argument("model")
output_folder = click.option(
    "--output", type=FILE, required=True, metavar="DIR", help="Folder to write; must not exist."
)


@click.command(epilog=examples("mka methods", "mka methods --json"))
@reports
def methods() -> Outcome:
    """List the methods that can plan a compression.

    With --json, their settings too: name, default, description.
    """
    from mka.methods import get_method, method_names

    entries: list[dict[str, Any]] = []
    for method in map(get_method, method_names()):
        settings = [
            {"name": name, "default": field.default, "type": str(field.annotation), "description": field.description}
            for name, field in method.settings.model_fields.items()
        ]
        needs = sorted(method.needs(method.settings()))
        entry = {"name": method.name, "summary": method.summary, "source": method.source, "needs": needs}
        entries.append(entry | {"settings": settings})
    rows = [[e["name"], e["summary"], ", ".join(e["needs"]) or "nothing"] for e in entries]
    return Outcome({"methods": entries}, align(rows, ["method", "what it does", "looks at"]))


@click.command(epilog=examples("mka observe ./smollm2 --calibration texts.jsonl --output states.safetensors"))
@model_argument
@click.option("--calibration", type=FILE, default=CALIBRATION, show_default=True, help="Texts the model reads.")
@combine(
    observation_options,
    click.option("--batch-size", type=int, help="Texts per forward pass.  [default: 16]"),
    loading_options,
)
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Hidden states, safetensors; must not exist.")
@reports
def observe(
    model: str, calibration: Path, output: Path, dtype: str | None, trust_remote_code: bool, **options: Any
) -> Outcome:
    """Run MODEL over calibration texts, keep hidden states.

    One forward pass gives one vector per layer and text. MODEL is a folder, a hub id org/name[@revision], or
    package:NAME==VERSION. The calibration file holds JSON lines with a `text` field, or paragraphs if its name ends in
    .txt; at least 50 texts, better 200.
    """
    from mka import stages
    from mka.calibration import load_calibration
    from mka.recipe import CalibrationSettings

    check_free(output)
    settings = build_section(CalibrationSettings, {"path": calibration, "rev": None} | given(options))
    texts = load_calibration(calibration, settings.samples)
    checkpoint, source = open_model(model, dtype, trust_remote_code)
    with quiet_libraries():
        states = stages.observe_checkpoint(checkpoint, texts, settings, source)
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


@click.command(
    epilog=examples("mka score ./smollm2 --states states.safetensors --set coordinates=3 --output scores.json")
)
@model_argument
@click.option("--states", type=FILE, required=True, metavar="FILE", help="What `mka observe` wrote.")
@click.option("--method", default="mka", show_default=True, help="Who scores; `mka methods` lists them.")
@set_option
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Scores, JSON; must not exist.")
@reports
def score(model: str, states: Path, method: str, settings: dict[str, Any], output: Path) -> Outcome:
    """Score how similar or important MODEL's layers are.

    What a high score means is printed with the scores; which kind it is depends on the method.
    """
    from mka import stages
    from mka.methods import method_settings
    from mka.recipe import MethodChoice
    from mka.states import HiddenStates

    check_free(output)
    method_settings(method, settings)
    choice = MethodChoice(name=method, settings=settings)
    if not stages.needs_hidden_states(choice):
        raise RecipeError(f"method {method!r} scores nothing; go on with mka plan {model} --method {method}")
    observed = HiddenStates.load(states)
    scores = stages.score_layers(choice, open_model(model)[0], observed)
    assert scores is not None
    write_file(output, scores.save)
    if scores.values.ndim == 2:
        rows = [[f"{i} - {i + 1}", f"{scores.values[i, i + 1]:.4f}"] for i in range(scores.layers - 1)]
        table = align(rows, ["layers", scores.kind.rpartition("-")[2]], "lr")
    else:
        table = align([[i, f"{value:.4f}"] for i, value in enumerate(scores.values)], ["layer", "importance"], "rr")
    document = json.loads(output.read_text(encoding="utf-8")) | {"output": str(output)}
    return Outcome(document, f"{scores.meaning}\n\n{table}\n\n{output}")


@click.command(epilog=examples("mka plan ./smollm2 --scores scores.json --layers 24 --output plan.json"))
@model_argument
@click.option("--scores", type=FILE, metavar="FILE", help="What `mka score` wrote; its method plans.")
@click.option("--method", help="Who plans without scores, e.g. reference_code.")
@target_options
@set_option
@click.option("--calibration", type=FILE, metavar="FILE", help="Texts, if settings make the method look again.")
@combine(observation_options, loading_options)
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Plan, JSON; must not exist.")
@reports
def plan(
    model: str,
    scores: Path | None,
    method: str | None,
    settings: dict[str, Any],
    calibration: Path | None,
    output: Path,
    dtype: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> Outcome:
    """Decide which layers of MODEL become one.

    Give one target: --layers, --layer-ratio or --size-ratio. With --set selection=iterative or weights=line-search
    the model is looked at again while planning, which needs --calibration. So do methods that fit something after a
    deletion (replaceme, prune_and_comp, linearpatch): it is written beside the plan, to plan.folds.safetensors.
    """
    from mka import stages
    from mka.calibration import load_calibration
    from mka.folds import bind_folds, folds_path, serialise_folds
    from mka.methods import get_method, method_settings
    from mka.plan_wording import describe_steps
    from mka.recipe import CalibrationSettings, MethodChoice, Target
    from mka.states import LayerScores

    check_free(output)
    observation = {key: options.pop(key) for key in ("samples", "max_tokens", "pooling")}
    target = build_section(Target, given(options))
    scored = LayerScores.load(scores) if scores else None
    choice = MethodChoice(name=method or (scored.method if scored else "mka"), settings=settings)
    method_settings(choice.name, choice.settings)
    if scored is not None:
        if scored.method != choice.name:
            raise PlanError(f"{scores} was scored by {scored.method!r}, not by {choice.name!r}; score again")
        if stale := sorted(settings.keys() - get_method(choice.name).plan_settings):
            raise RecipeError(f"setting {stale[0]!r} decides the scores; give it to mka score and score again")
        choice = choice.model_copy(update={"settings": {**scored.settings, **settings}})
        method_settings(choice.name, choice.settings)
    elif stages.needs_hidden_states(choice):
        raise RecipeError(f"method {choice.name!r} plans from scores; run mka score and give --scores FILE")
    looking = build_section(CalibrationSettings, {"path": calibration or CALIBRATION} | given(observation))
    texts = load_calibration(calibration, looking.samples) if calibration else None
    checkpoint, source = open_model(model, dtype, trust_remote_code)
    with quiet_libraries():
        made = stages.plan_layers(choice, target, checkpoint, scored, texts, looking, source)
        folds = stages.fit_folds(choice, made, checkpoint, texts, looking, source)
    if folds:
        made = bind_folds(made, folds)
        write_file(folds_path(output), lambda path: path.write_bytes(serialise_folds(folds)))
    write_file(output, lambda path: path.write_text(made.to_json(), encoding="utf-8"))
    steps = [f"{number:3}. {line}" for number, line in enumerate(describe_steps(made), 1)] or ["nothing changes"]
    head = f"{made.label}: {made.layers_in} layers become {made.layers_out}"
    return Outcome(json.loads(made.to_json()) | {"output": str(output)}, "\n".join([head, *steps, str(output)]))


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
    from mka.alignment_report import summarise_alignment
    from mka.alignment_table import fit_windows, open_alignment
    from mka.checkpoint import describe_checkpoint, open_checkpoint
    from mka.compress import write_candidate
    from mka.folds import load_folds
    from mka.merging import check_alignable, check_plan_fits
    from mka.plan import MergePlan
    from mka.quantize import check_group_size
    from mka.recipe import AlignmentSettings, QuantizeSettings
    from mka.writing import publish

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
        check_group_size(base, settings.group_size)
    with quiet_libraries():
        table = fit_windows(table, base) if table else None
    with quiet_libraries(settings.scheme != "off"), publish(output) as partial:
        found = write_candidate(made, base, settings, partial, folds, table, source)
    facts = describe_checkpoint(open_checkpoint(output, verify=False)) | {"parameters": found["parameters"]}
    said = f"{facts['layers']} layers, {facts['parameters'] / 1e6:,.1f} M parameters, {facts['bytes'] / 1e6:,.1f} MB"
    fit = found.pop("alignment", None)
    lines = [said, *([summarise_alignment(fit)] if fit else []), str(output)]
    return Outcome(facts | {"output": str(output), "loaded": found, "alignment": fit}, "\n".join(lines))
