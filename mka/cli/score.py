"""`mka score`: how similar or important the layers are, as a method sees it."""

import json
from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import open_model
from mka.cli.options import FILE, Command, build_section, model_argument, pick, recipe_options
from mka.errors import RecipeError
from mka.store.publishing import check_free, write_file
from mka.terminal import Outcome, align


@click.command(
    cls=Command,
    epilog=examples("mka score ./smollm2 --states states.safetensors --set coordinates=3 --output scores.json"),
)
@model_argument
@click.option("--states", type=FILE, required=True, metavar="FILE", help="What `mka observe` wrote.")
@recipe_options("method")
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Scores, JSON; must not exist.")
@reports
def score(model: str, states: Path, output: Path, asked: dict[str, Any]) -> Outcome:
    """Score how similar or important MODEL's layers are.

    What a high score means is printed with the scores; which kind it is depends on the method.
    """
    from mka.evidence.states import HiddenStates
    from mka.methods import resolve_method
    from mka.pipeline.score import score_layers
    from mka.recipe import MethodChoice
    from mka.similarity.stability import describe_stability

    check_free(output)
    planner = resolve_method(build_section(MethodChoice, pick(asked, "method")))
    if planner.method.score is None:
        raise RecipeError(
            f"method {planner.name!r} scores nothing; go on with mka plan {model} --method {planner.name}"
        )
    observed = HiddenStates.load(states)
    scores = score_layers(planner, open_model(model, asked)[0], observed)
    assert scores is not None
    write_file(output, scores.save)
    if scores.values.ndim == 2:
        rows = [[f"{i} - {i + 1}", f"{scores.values[i, i + 1]:.4f}"] for i in range(scores.layers - 1)]
        table = align(rows, ["layers", scores.kind.rpartition("-")[2]], "lr")
    else:
        table = align([[i, f"{value:.4f}"] for i, value in enumerate(scores.values)], ["layer", "importance"], "rr")
    document = json.loads(output.read_text(encoding="utf-8")) | {"output": str(output)}
    told = [scores.meaning, table, describe_stability(scores), str(output)]
    return Outcome(document, "\n\n".join(filter(None, told)))
