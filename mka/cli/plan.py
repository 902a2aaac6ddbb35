"""`mka plan`: which layers become one."""

import json
from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import open_with_table
from mka.cli.options import FILE, Command, build_section, device_option, model_argument, pick, recipe_options
from mka.errors import PlanError, RecipeError
from mka.store.publishing import check_free, write_file
from mka.terminal import Outcome, quiet_libraries


@click.command(cls=Command, epilog=examples("mka plan ./smollm2 --scores scores.json --layers 24 --output plan.json"))
@model_argument
@click.option("--scores", type=FILE, metavar="FILE", help="What `mka score` wrote; its method plans.")
@recipe_options(
    *("method.name", "target", "method.settings", "calibration", "model"),
    help={
        "method.name": "Who plans without scores, e.g. reference_code.",
        "calibration.path": "Texts, if settings make the method look again.",
    },
)
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Plan, JSON; must not exist.")
@device_option
@reports
def plan(model: str, scores: Path | None, output: Path, asked: dict[str, Any]) -> Outcome:
    """Decide which layers of MODEL become one.

    Give a target: --layers, --layer-ratio or --size-ratio, or what bounds the layers, --bytes and the like. With --set
    selection=iterative or weights=line-search the model is looked at again while planning, which needs --calibration.
    So do methods that fit something after a deletion (replaceme, prune_and_comp, linearpatch): it is written beside
    the plan, to plan.folds.safetensors.
    """
    from mka.evidence.states import LayerScores
    from mka.methods import resolve_method
    from mka.pipeline.plan import fit_folds, open_planner_oracles, plan_layers
    from mka.pipeline.target import resolve_aim
    from mka.plan.wording import describe_steps
    from mka.recipe import CalibrationSettings, MethodChoice, Target
    from mka.texts.calibration import load_calibration
    from mka.transforms.fold import bind_folds, folds_path, serialise_folds

    check_free(output)
    target = build_section(Target, pick(asked, "target"))
    scored = LayerScores.load(scores) if scores else None
    choice = build_section(MethodChoice, ({"name": scored.method} if scored else {}) | pick(asked, "method"))
    planner = resolve_method(choice)
    if scored is not None:
        if scored.method != planner.name:
            raise PlanError(f"{scores} was scored by {scored.method!r}, not by {planner.name!r}; score again")
        if stale := sorted(choice.settings.keys() - planner.method.plan_settings):
            raise RecipeError(f"setting {stale[0]!r} decides the scores; give it to mka score and score again")
        planner = resolve_method(MethodChoice(name=planner.name, settings={**scored.settings, **choice.settings}))
    elif planner.method.score is not None:
        raise RecipeError(f"method {planner.name!r} plans from scores; run mka score and give --scores FILE")
    looking = build_section(CalibrationSettings, pick(asked, "calibration"))
    checkpoint, source, texts = open_with_table(
        model,
        asked,
        lambda file: load_calibration(file, looking.samples),
        calibration=looking if "calibration.path" in asked else None,
    )
    aim = resolve_aim(target, checkpoint)
    with quiet_libraries():
        with open_planner_oracles(planner, checkpoint, texts, looking, source) as oracles:
            made = plan_layers(planner, aim, checkpoint, scored, source, oracles)
        folds = fit_folds(planner, made, checkpoint, texts, looking, source)
    if folds:
        made = bind_folds(made, folds)
        write_file(folds_path(output), lambda path: path.write_bytes(serialise_folds(folds)))
    write_file(output, lambda path: path.write_text(made.to_json(), encoding="utf-8"))
    steps = [f"{number:3}. {line}" for number, line in enumerate(describe_steps(made), 1)] or ["nothing changes"]
    head = f"{made.label}: {made.layers_in} layers become {made.layers_out}"
    if "spent" in made.search:
        head += f"; {made.search['spent']:,.0f} forward tokens spent"
    return Outcome(json.loads(made.to_json()) | {"output": str(output)}, "\n".join([head, *steps, str(output)]))
