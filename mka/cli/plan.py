"""`mka plan`: which layers become one."""

import json
from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.options import (
    CALIBRATION,
    FILE,
    build_section,
    combine,
    given,
    loading_options,
    model_argument,
    observation_options,
    open_model,
    set_option,
    target_options,
)
from mka.errors import PlanError, RecipeError
from mka.store.publishing import check_free, write_file
from mka.terminal import Outcome, quiet_libraries


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
    from mka.evidence.gather import open_oracles
    from mka.evidence.states import LayerScores
    from mka.methods import resolve_method
    from mka.pipeline.job import resolve_aim
    from mka.pipeline.plan import fit_folds, plan_layers
    from mka.plan.wording import describe_steps
    from mka.recipe import CalibrationSettings, MethodChoice, Target
    from mka.texts.calibration import load_calibration
    from mka.transforms.fold import bind_folds, folds_path, serialise_folds

    check_free(output)
    observation = {key: options.pop(key) for key in ("samples", "max_tokens", "pooling")}
    target = build_section(Target, given(options))
    scored = LayerScores.load(scores) if scores else None
    planner = resolve_method(MethodChoice(name=method or (scored.method if scored else "mka"), settings=settings))
    if scored is not None:
        if scored.method != planner.name:
            raise PlanError(f"{scores} was scored by {scored.method!r}, not by {planner.name!r}; score again")
        if stale := sorted(settings.keys() - planner.method.plan_settings):
            raise RecipeError(f"setting {stale[0]!r} decides the scores; give it to mka score and score again")
        planner = resolve_method(MethodChoice(name=planner.name, settings={**scored.settings, **settings}))
    elif planner.method.score is not None:
        raise RecipeError(f"method {planner.name!r} plans from scores; run mka score and give --scores FILE")
    looking = build_section(CalibrationSettings, {"path": calibration or CALIBRATION} | given(observation))
    texts = load_calibration(calibration, looking.samples) if calibration else None
    checkpoint, source = open_model(model, dtype, trust_remote_code)
    aim = resolve_aim(target, checkpoint)
    with quiet_libraries():
        oracles = open_oracles(planner.name, planner.needs, planner.settings, checkpoint, texts, looking, source)
        made = plan_layers(planner, aim, checkpoint, scored, source, oracles)
        folds = fit_folds(planner, made, checkpoint, texts, looking, source)
    if folds:
        made = bind_folds(made, folds)
        write_file(folds_path(output), lambda path: path.write_bytes(serialise_folds(folds)))
    write_file(output, lambda path: path.write_text(made.to_json(), encoding="utf-8"))
    steps = [f"{number:3}. {line}" for number, line in enumerate(describe_steps(made), 1)] or ["nothing changes"]
    head = f"{made.label}: {made.layers_in} layers become {made.layers_out}"
    return Outcome(json.loads(made.to_json()) | {"output": str(output)}, "\n".join([head, *steps, str(output)]))
